"""The effective receptive field against known supports and exact Jacobians."""

import subprocess
import sys
from itertools import pairwise

import pytest
import timm
import torch
from PIL import Image
from torch import nn

from foveal.analysis import draw_receptive_fields, effective_receptive_field
from foveal.blocks import AggregatedAttention, ConvGLU
from foveal.models import Backbone, Stage


def convolutions(depth: int, width: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    widths = [3, *[width] * depth]
    return nn.Sequential(*(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths)))


def foveal_backbone() -> Backbone:
    torch.manual_seed(0)
    mixers = {"mixer": lambda dim: AggregatedAttention(dim, num_heads=2, pool_ratio=4), "mlp": ConvGLU}
    return Backbone([Stage(dim=16, depth=1, **mixers), Stage(dim=32, depth=1, **mixers)], num_classes=3)


@pytest.mark.parametrize("depth", [1, 3])
def test_support_of_a_convolution_stack(depth):
    field = effective_receptive_field(convolutions(depth), torch.randn(2, 3, 16, 21))
    support = torch.zeros(16, 21, dtype=torch.bool)
    support[8 - depth : 8 + depth + 1, 10 - depth : 10 + depth + 1] = True
    assert field.shape == (16, 21)
    assert torch.equal(field > 0, support)


def test_estimates_the_norm_of_the_jacobian():
    net = nn.Sequential(convolutions(2), nn.GELU())
    images = torch.randn(2000, 3, 5, 6)
    field = effective_receptive_field(net, images)
    few = images[:200]
    jacobian = torch.func.vmap(torch.func.jacrev(lambda x: net(x)[:, 2, 3]))(few)  # (images, features, colours, H, W)
    exact = jacobian.square().sum(dim=(1, 2)).mean(0).sqrt()
    torch.testing.assert_close(field, exact, rtol=0.15, atol=0.01)


def test_features_that_sum_to_a_constant_have_a_field():
    """Behind a LayerNorm the plain sum of the features has no gradient; their Jacobian has."""
    net = foveal_backbone()
    pixels = torch.randn(1, 3, 32, 32, requires_grad=True)
    (plain,) = torch.autograd.grad(net.forward_features(pixels)[0, :, 2, 2].sum(), pixels)
    field = effective_receptive_field(net, pixels)
    assert plain.abs().max() < 1e-3 * field.max()


def test_the_centre_counts_most_in_a_foveal_stage():
    field = effective_receptive_field(foveal_backbone(), torch.randn(8, 3, 64, 64), stage=0)
    assert (field > 0).all()  # the pooled keys see everything
    centre = field[28:42, 28:42]  # the fovea: a 3 x 3 window and 3 x 3 convolutions of 4-pixel cells
    assert centre.mean() > 10 * field[:16].mean()


def test_the_model_is_left_as_it_was():
    net = nn.Sequential(convolutions(1, width=8), nn.BatchNorm2d(8), nn.Dropout(0.5))
    net.train()
    net[1].eval()
    net[0][0].bias.requires_grad_(False)
    weight = net[0][0].weight
    weight.grad = torch.ones_like(weight)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    images = torch.randn(2, 3, 8, 8)
    with torch.inference_mode():
        first, second = (effective_receptive_field(net, images) for _ in range(2))
    assert torch.equal(first, second)
    assert [module.training for module in (net, net[0], net[1], net[2])] == [True, True, False, True]
    assert torch.equal(weight.grad, torch.ones_like(weight))
    assert all(p.grad is None for p in net.parameters() if p is not weight)
    assert not net[0][0].bias.requires_grad
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert images.grad is None
    assert not images.requires_grad


def test_batches_give_the_field_of_all_images():
    net, images = foveal_backbone(), torch.randn(6, 3, 32, 40)
    torch.testing.assert_close(effective_receptive_field(net, images.split(4)), effective_receptive_field(net, images))


@pytest.mark.parametrize(
    ("name", "stages"), [("resnet18", 5), ("convnext_atto", 4), ("vit_tiny_patch16_224", 12), ("transnext_micro", 4)]
)
def test_models_of_timm(name, stages):
    net = timm.create_model(name, **({"img_size": 64} if name.startswith("vit") else {}))
    images = torch.randn(1, 3, 64, 64)
    field = effective_receptive_field(net, images, stage=stages - 1)
    assert field.shape == (64, 64)
    assert field.isfinite().all()
    assert field.max() > 0
    assert torch.equal(field, effective_receptive_field(net, images))
    with pytest.raises(ValueError, match=f"stage .* {stages} feature maps"):
        effective_receptive_field(net, images, stage=stages)


def test_channels_last_feature_extractor():
    """Swin's extractor returns (B, H, W, C)."""
    name, images = "swin_tiny_patch4_window7_224", torch.randn(1, 3, 64, 64)
    torch.manual_seed(0)
    net = timm.create_model(name, img_size=64)
    torch.manual_seed(0)
    extractor = timm.create_model(name, img_size=64, features_only=True)
    extractor.load_state_dict(net.state_dict(), strict=False)
    fields = (effective_receptive_field(model, images, stage=1) for model in (net, extractor))
    torch.testing.assert_close(*fields)


def test_errors():
    with pytest.raises(ValueError, match="images"):
        effective_receptive_field(convolutions(1), [])
    with pytest.raises(ValueError, match="model must give maps"):
        effective_receptive_field(nn.Flatten(), torch.randn(1, 3, 4, 4))
    with pytest.raises(ValueError, match="fields"):
        draw_receptive_fields({}, "unused.png")


def test_drawing(tmp_path):
    field = effective_receptive_field(convolutions(3), torch.randn(2, 3, 16, 16))
    for name, values in (("drawn", field), ("dark", torch.zeros(16, 16))):
        draw_receptive_fields({"stage 1": values}, tmp_path / f"{name}.png")
    drawn, dark = (colourful(tmp_path / f"{name}.png") for name in ("drawn", "dark"))
    assert drawn > dark + 0.05


def colourful(path) -> float:
    """The share of pixels that are neither grey nor black: a field's bright part, and the colour bar."""
    red, green, blue = (
        torch.frombuffer(bytearray(Image.open(path).convert("RGB").tobytes()), dtype=torch.uint8).view(-1, 3).T.int()
    )
    return ((red - blue).abs() + (red - green).abs() > 40).float().mean().item()


def test_importing_needs_no_matplotlib():
    code = "import sys, foveal.analysis; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
