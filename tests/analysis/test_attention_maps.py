"""Attention weights: times the values they are what the block computes; and where they lie on the map."""

from functools import partial

import pytest
import torch
from torch import nn

from foveal.analysis import attention_blocks, attention_map, attention_weights, draw_attention_maps
from foveal.blocks import (
    AggregatedAttention,
    ConvGLU,
    LengthScaledCosineAttention,
    PixelFocusedAttention,
    SpatialReductionAttention,
)
from foveal.models import Backbone, Stage
from foveal.ops import window_sum
from tests.examples.running import colourful
from tests.helpers import assert_near, randomised

MIXERS = {
    "aggregated": partial(AggregatedAttention, pool_ratio=2),
    "window of 5": partial(AggregatedAttention, pool_ratio=3, window_size=5),
    "linear mode, learned": partial(AggregatedAttention, pool_grid=(2, 3), pool_bias="learned"),
    "plain": partial(PixelFocusedAttention, pool_ratio=2),
    "no bias": partial(PixelFocusedAttention, pool_ratio=2, window_bias=None, pool_bias=None),
    "interpolated": partial(AggregatedAttention, pool_ratio=2, bias_resampling="interpolate", bias_grid=4),
    "global": LengthScaledCosineAttention,
    "global, no bias": partial(LengthScaledCosineAttention, position_bias=None, length_scaled=False),
    "spatial reduction": partial(SpatialReductionAttention, sr_ratio=2),
}


def make(name: str, dtype=torch.float64) -> nn.Module:
    return randomised(MIXERS[name](12, num_heads=3).to(dtype)).eval()


def values(mixer: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The values of all cells and of the pooled ones, by their definition: ``(B, *, *, heads, d)``."""
    if isinstance(mixer, SpatialReductionAttention):
        pooled = mixer.kv(mixer._reduce(x))[..., 12:]
        own = pooled
    else:
        own = mixer.qkv(x)[..., 24:]
        pooled = own
        if hasattr(mixer, "pool"):
            weight, bias = mixer.qkv.weight[24:], mixer.qkv.bias[24:]
            pooled = nn.functional.linear(mixer.pool(x, mixer.key_grid(x.shape[1:3])), weight, bias)
    return own.unflatten(-1, (3, 4)), pooled.unflatten(-1, (3, 4))


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("grid", [(6, 8), (5, 3)], ids=str)
def test_weights_times_values_are_the_output(name, grid):
    mixer, x = make(name), torch.randn(2, *grid, 12, dtype=torch.float64)
    weights = mixer.attention_weights(x)
    own, pooled = values(mixer, x)
    out = torch.einsum("bhwnac,bacnd->bhwnd", weights.pool, pooled)
    if weights.window is not None:
        near = weights.window if weights.positional is None else weights.window + weights.positional
        out = out + window_sum(near.flatten(-2), own, near.shape[-1])
    assert (weights.positional is not None) == isinstance(mixer, AggregatedAttention)
    torch.testing.assert_close(mixer.proj(out.flatten(3)), mixer(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", MIXERS)
def test_weights_sum_to_one_within_the_map(name):
    weights = make(name).attention_weights(torch.randn(1, 6, 8, 12, dtype=torch.float64))
    total = weights.pool.sum((-2, -1))
    assert weights.pool.min() >= 0
    if weights.window is not None:
        total = total + weights.window.sum((-2, -1))
        radius = weights.window.shape[-1] // 2
        for kind in (weights.window, weights.positional):
            if kind is not None:
                assert (kind[:, 0, :, :, :radius] == 0).all()
                assert (kind[:, :, -1, :, :, -radius:] == 0).all()
                assert (kind[:, 2, 3] != 0).all()
    torch.testing.assert_close(total, torch.ones_like(total))


def test_weights_of_the_compiled_op_in_float32():
    """What runs fast is what is looked at."""
    mixer, x = make("aggregated", torch.float32), torch.randn(1, 7, 9, 12)
    weights, (own, pooled) = mixer.attention_weights(x), values(mixer, x)
    out = window_sum((weights.window + weights.positional).flatten(-2), own, 3)
    out = out + torch.einsum("bhwnac,bacnd->bhwnd", weights.pool, pooled)
    assert_near(mixer.proj(out.flatten(3)), mixer(x))


@pytest.fixture
def net() -> Backbone:
    aggregated = partial(AggregatedAttention, num_heads=2, pool_ratio=4)
    net = Backbone(
        [
            Stage(dim=16, depth=2, mixer=[aggregated, lambda dim: nn.Identity()], mlp=ConvGLU),
            Stage(dim=32, depth=1, mixer=partial(LengthScaledCosineAttention, num_heads=4), mlp=ConvGLU),
        ],
        num_classes=3,
        proj_drop_rate=0.5,  # what a model does in training must not be seen
    )
    return randomised(net, 0.2)


def test_a_block_of_a_model_by_its_name(net):
    assert attention_blocks(net) == ["stages.0.blocks.0.mixer", "stages.1.blocks.0.mixer"]
    images = torch.randn(2, 3, 32, 48)
    net.train()
    weights = attention_weights(net, images, "stages.1.blocks.0")
    assert net.training
    assert net.stages[1].blocks[0].mixer.training
    net.eval()
    block = net.stages[1].blocks[0]
    x = net.stages[1].downsample(net.stages[0](images.permute(0, 2, 3, 1)))
    expected = block.mixer.attention_weights(block.norm1(x))
    assert weights.pool.shape == (2, 4, 6, 4, 4, 6)
    torch.testing.assert_close(weights.pool, expected.pool)
    torch.testing.assert_close(attention_weights(net, images, "stages.1.blocks.0.mixer").pool, expected.pool)


@pytest.mark.parametrize("block", ["stages.0.blocks.1", "stages", "", "stages.1.blocks.00"])
def test_a_name_that_is_no_attention(block, net):
    with pytest.raises(
        ValueError, match=r"block must name one attention.*there are: stages.0.blocks.0.mixer, stages.1"
    ):
        attention_weights(net, torch.randn(1, 3, 16, 16), block)


def test_a_mixer_that_runs_twice(net):
    twice = nn.Sequential(net.stages[0].blocks[0].mixer, net.stages[0].blocks[0].mixer)
    with pytest.raises(ValueError, match="run 2 times"):
        attention_weights(twice, torch.randn(1, 4, 4, 16), "0")


@pytest.mark.parametrize("name", MIXERS)
def test_the_map_of_a_query(name):
    """By counting cells: each in a pooled one gets its share, those of the window their weight on top."""
    weights = make(name).attention_weights(torch.randn(1, 6, 8, 12, dtype=torch.float64))
    with torch.inference_mode():
        (shares,) = attention_map(weights, (0, 6))
    assert shares.shape == (3, 6, 8)
    expected = torch.zeros_like(shares)
    height, width = weights.pool.shape[4:]
    for a in range(height):
        rows = slice(a * 6 // height, -(-(a + 1) * 6 // height))
        for c in range(width):
            cells = expected[:, rows, c * 8 // width : -(-(c + 1) * 8 // width)]
            cells += weights.pool[0, 0, 6, :, a, c, None, None] / cells[0].numel()
    if weights.window is not None:
        radius = weights.window.shape[-1] // 2
        window = weights.window[0, 0, 6, :, radius:, : radius + min(radius, 1) + 1]
        expected[:, : radius + 1, 6 - radius :] += window
    torch.testing.assert_close(shares, expected)
    torch.testing.assert_close(shares.sum((1, 2)), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("query", [(6, 0), (0, 8), (-1, 0), (1,)])
def test_a_query_outside_the_map(query):
    weights = make("global").attention_weights(torch.randn(1, 6, 8, 12, dtype=torch.float64))
    with pytest.raises(ValueError, match="query must be a row and a column of the 6 x 8 map"):
        attention_map(weights, query)


@pytest.mark.parametrize("name", ["aggregated", "plain", "global"])
def test_drawing(name, tmp_path):
    weights = make(name).attention_weights(torch.randn(1, 6, 8, 12, dtype=torch.float64))
    draw_attention_maps(torch.zeros(1, 24, 32), weights, [(0, 0), (3, 4)], tmp_path / "mean.png")
    draw_attention_maps(torch.zeros(3, 24, 32), weights, [(3, 4)], tmp_path / "heads.png", heads=[0, 2], title="heads")
    assert all(0.05 < colourful(tmp_path / f"{picture}.png") < 0.9 for picture in ("mean", "heads"))


def test_drawing_refuses(tmp_path):
    weights = make("plain").attention_weights(torch.randn(2, 6, 8, 12, dtype=torch.float64))
    one = type(weights)(*(None if values is None else values[:1] for values in weights))
    image, path = torch.zeros(3, 6, 8), tmp_path / "unused.png"
    for arguments, message in (
        ((image[None], one, [(0, 0)]), "image must have shape"),
        ((image, weights, [(0, 0)]), "weights must be those of one image, got 2"),
        ((image, one, []), "queries must hold at least one"),
        ((image, one, [(6, 0)]), "query must be"),
    ):
        with pytest.raises(ValueError, match=message):
            draw_attention_maps(*arguments, path)
    for heads in ([], [3], [-1]):
        with pytest.raises(ValueError, match="heads must be some of the block's heads, 0 to 2"):
            draw_attention_maps(image, one, [(0, 0)], path, heads=heads)
