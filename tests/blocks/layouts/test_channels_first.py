"""Blocks over (B, C, H, W)."""

import copy
import pickle

import pytest
import torch
from torch import nn

from foveal.blocks import AggregatedAttention, ConvGLU, OverlapPatchEmbed
from foveal.blocks.layouts import ChannelsFirst
from tests.helpers import GRIDS, assert_near, randomised

BLOCKS = {
    "ConvGLU": lambda: ConvGLU(8),
    "ConvGLU, other channels out": lambda: ConvGLU(8, out_dim=12),
    "AggregatedAttention": lambda: AggregatedAttention(8, 2, pool_ratio=2),
    "OverlapPatchEmbed": lambda: OverlapPatchEmbed(8, 12, patch_size=3, stride=2),
}


@pytest.fixture(params=BLOCKS.values(), ids=BLOCKS)
def block(request):
    return randomised(request.param()).eval()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_equals_the_block(block, grid):
    x = torch.randn(2, 8, *grid)
    assert torch.equal(ChannelsFirst(block)(x), block(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


def test_equals_convolutions():
    """A ConvGLU between convolutions is what it would be in plain convolutions."""
    block = randomised(ConvGLU(8, hidden_dim=5, out_dim=12)).eval()
    x = torch.randn(2, 8, 6, 7)
    gate, value = nn.functional.conv2d(x, block.fc1.weight[..., None, None], block.fc1.bias).chunk(2, dim=1)
    gate = nn.functional.conv2d(gate, block.dwconv.weight, block.dwconv.bias, padding=1, groups=5)
    out = nn.functional.gelu(gate) * value
    assert_near(ChannelsFirst(block)(x), nn.functional.conv2d(out, block.fc2.weight[..., None, None], block.fc2.bias))


def test_gradients_reach_input_and_parameters(block):
    x = torch.randn(2, 8, 5, 6, requires_grad=True)
    ChannelsFirst(block)(x).square().sum().backward()
    assert x.grad.any()
    assert all(p.grad.any() for p in block.parameters())


def test_copies(block):
    adapter = ChannelsFirst(block)
    x = torch.randn(1, 8, 5, 6)
    expected = adapter(x)
    for twin in (copy.deepcopy(adapter), pickle.loads(pickle.dumps(adapter))):
        assert torch.equal(twin(x), expected)


@pytest.mark.parametrize("shape", [(2, 30, 8), (8,)], ids=str)
def test_wrong_shape_is_named(shape):
    with pytest.raises(ValueError, match=r"x must have shape \(B, C, H, W\)"):
        ChannelsFirst(ConvGLU(8))(torch.randn(shape))


def test_channels_last_input_is_named():
    with pytest.raises(ValueError, match="x must have"):
        ChannelsFirst(ConvGLU(8))(torch.randn(2, 5, 6, 8))


def test_a_class_is_no_block():
    with pytest.raises(TypeError, match="block must be"):
        ChannelsFirst(ConvGLU)
