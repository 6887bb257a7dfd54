"""Counting FLOPs: the same on every backend and device, and by the paper's rule."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from foveal.analysis import count_flops, count_multiply_adds
from foveal.blocks import ConvGLU, LengthScaledCosineAttention, LogCPB, PixelFocusedAttention, SpatialReductionAttention
from foveal.models import transnext
from foveal.ops import backend
from tests.ops.helpers import needs_compiler


def small(**kwargs) -> nn.Module:
    return transnext((12, 24), (1, 2), (1, 2), (4, 4), (4, None), num_classes=10, pretrain_size=64, **kwargs)


@pytest.mark.parametrize("size", [(64, 64), (44, 72)])
def test_the_count_is_the_same_on_every_device_and_backend(size):
    images = torch.randn(2, 3, *size)
    model = small()
    expected = count_flops(model.to("meta"), images.to("meta"))
    model = small()
    for name in ("reference", "auto"):
        with backend(name):
            assert count_flops(model, images) == expected


@needs_compiler
@pytest.mark.parametrize("size", [(64, 64), (44, 72)])
def test_the_compiled_ops_count_like_their_definitions(size):
    model, images = small(), torch.randn(1, 3, *size)
    counts = []
    for name in ("compiled", "reference"):
        with backend(name):
            counts.append((count_flops(model, images), count_multiply_adds(model, images)))
    assert counts[0] == counts[1]


def test_agrees_with_torch_where_torch_counts_all():
    model, images = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 5)), torch.randn(2, 3, 8, 8)
    with FlopCounterMode(display=False) as counter:
        model(images)
    assert count_flops(model, images) == counter.get_total_flops() == 2 * 2 * (27 * 4 * 36 + 4 * 36 * 5)


@pytest.mark.parametrize("attention", [LengthScaledCosineAttention, SpatialReductionAttention])
def test_global_attention_is_counted_on_the_cpu(attention):
    arguments = {"position_bias": None} if attention is LengthScaledCosineAttention else {}
    block = attention(24, num_heads=2, **arguments)
    cells = 5 * 7
    assert count_flops(block, torch.randn(1, 5, 7, 24)) == 2 * (4 * cells * 24**2 + 2 * cells**2 * 24)


def test_a_kept_position_bias_is_counted_as_computed():
    model, images = small().eval(), torch.randn(1, 3, 64, 64)
    first = count_flops(model, images)
    with torch.inference_mode():
        model(images)
    assert count_flops(model, images) == first


def test_the_papers_rule_for_norms_and_pools():
    x = torch.randn(2, 5, 6, 8)
    assert count_multiply_adds(nn.LayerNorm(8), x) == 5 * x.numel()
    assert count_multiply_adds(nn.AdaptiveAvgPool2d((2, 3)), x) == x.numel()
    glu = ConvGLU(8, hidden_dim=4)
    assert count_multiply_adds(glu, x) == count_flops(glu, x) // 2


class Bias(nn.Module):
    def __init__(self):
        super().__init__()
        self.log_cpb = LogCPB(num_heads=3, hidden_dim=16)

    def forward(self, x):
        return self.log_cpb((8, 6), (2, 3), (8, 8)).table


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", ["auto", "reference"])
def test_the_papers_rule_for_log_cpb_is_that_of_a_plain_mlp(device, name):
    x = torch.empty(1, device=device)
    bias = Bias().to(device)
    heads, rows, columns = bias(x).shape
    with backend(name):
        assert count_multiply_adds(bias, x) == rows * columns * 16 * (2 + heads)
        assert count_flops(bias, x) == 2 * rows * columns * 16 * heads


def test_the_papers_rule_for_a_pool_between():
    """Two more terms than the products: the activation map enters the pool, the pooled one a LayerNorm."""
    block = PixelFocusedAttention(8, num_heads=2, pool_ratio=2, pool_bias=None)
    x = torch.randn(1, 6, 4, 8)
    assert count_multiply_adds(block, x) - count_flops(block, x) // 2 == x.numel() + 5 * (3 * 2 * 8)


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout())
    model.train()
    model[2].eval()
    count_flops(model, torch.randn(2, 3, 8, 8))
    assert [module.training for module in model] == [True, True, False]
    assert model[1].num_batches_tracked == 0
    assert all(parameter.grad is None for parameter in model.parameters())
