"""Pixel-focused attention and its switches, against a cell-by-cell computation."""

import pytest
import torch

from foveal.blocks import AggregatedAttention, PixelFocusedAttention
from tests.blocks import naive
from tests.helpers import GRIDS, assert_near, gradcheck_module, randomised

ALL_ON = {"cosine": True, "length_scaled": True, "query_embedding": True, "positional_attention": True}
SWITCHES = {
    "plain": {},
    "cosine": {"cosine": True},
    "length scale": {"cosine": True, "length_scaled": True},
    "length scale without cosine": {"length_scaled": True},
    "query embedding": {"cosine": True, "query_embedding": True},
    "query embedding without cosine": {"query_embedding": True},
    "positional attention": {"positional_attention": True},
    "no window bias": {"window_bias": None},
    "window log-CPB": {"window_bias": "log-cpb"},
    "window log-CPB alone": {"window_bias": "log-cpb", "pool_bias": None},
    "no pool bias": {"pool_bias": None},
    "learned pool bias": {"pool_bias": "learned", "pool_grid": (2, 3)},
    "no bias": {"window_bias": None, "pool_bias": None},
    "no qkv bias": {"qkv_bias": False},
    "everything": ALL_ON,
    "everything, window 5": {**ALL_ON, "window_size": 5},
    "everything, window 1": {**ALL_ON, "window_size": 1},
    "everything, pre-trained elsewhere": {**ALL_ON, "pretrain_grid": (9, 4), "window_bias": "log-cpb"},
    "everything, pre-trained on one row": {**ALL_ON, "pretrain_grid": (1, 5), "window_bias": "log-cpb"},
    "everything, pool larger than the map": {**ALL_ON, "pool_grid": (7, 9)},
    "everything, pool of one cell": {**ALL_ON, "pool_grid": 1},
    "everything, pool that does not divide": {**ALL_ON, "pool_grid": (3, 2)},
}


def expected(block: PixelFocusedAttention, x: torch.Tensor, **switches) -> torch.Tensor:
    grid = tuple(x.shape[1:3])
    key_grid = switches.pop("pool_grid", tuple(max(1, side // 2) for side in grid))
    key_grid = (key_grid, key_grid) if isinstance(key_grid, int) else key_grid
    pretrain_grid = switches.pop("pretrain_grid", grid)
    names = ("cosine", "length_scaled", "window_bias", "pool_bias")
    stated = {name: switches[name] for name in names if name in switches}
    return torch.stack([naive.pixel_focused_attention(block, one, key_grid, pretrain_grid, **stated) for one in x])


@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (5, 3), (4, 6)], ids=str)
@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
def test_every_switch_against_loops(switches, grid):
    block = randomised(PixelFocusedAttention(8, 2, pool_ratio=2, dtype=torch.float64, **switches)).eval()
    x = torch.randn(2, *grid, 8, dtype=torch.float64)
    with torch.no_grad():
        assert_near(block(x), expected(block, x, **switches), tol=1e-9)


@pytest.mark.parametrize(
    "parameter", ["query_embedding", "positional_tokens", "positional_bias", "window_bias", "temperature"]
)
def test_a_switch_owns_its_parameter(parameter):
    everything = dict(AggregatedAttention(8, 2).named_parameters())
    plain = dict(PixelFocusedAttention(8, 2, window_bias=None).named_parameters())
    assert parameter in everything
    assert parameter not in plain


def test_no_bias_has_no_mlp():
    assert PixelFocusedAttention(8, 2, window_bias=None, pool_bias=None).log_cpb is None


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("window_size", [3, 7])
def test_shapes(grid, window_size):
    block = AggregatedAttention(12, 3, window_size=window_size, pool_ratio=4)
    x = torch.randn(2, *grid, 12, requires_grad=True)
    out = block(x)
    out.square().sum().backward()
    assert out.shape == x.shape
    assert out.is_contiguous()
    assert out.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())
    assert x.grad.isfinite().all()


@pytest.mark.parametrize(
    ("grid", "key_grid"), [((56, 56), (7, 7)), ((57, 63), (7, 7)), ((5, 9), (1, 1)), ((1, 16), (1, 2))]
)
def test_pool_ratio_rounds_down_to_at_least_one_cell(grid, key_grid):
    assert AggregatedAttention(8, 2, pool_ratio=8).key_grid(grid) == key_grid


def test_linear_mode_fixes_the_pool():
    block = AggregatedAttention(8, 2, pool_grid=(7, 5))
    assert {block.key_grid(grid) for grid in GRIDS} == {(7, 5)}


@pytest.mark.parametrize("grid", [(4, 4), (5, 7), (3, 2)], ids=str)
def test_interpolation_resamples_the_bias_of_the_declared_grid(grid):
    block = AggregatedAttention(8, 2, pool_ratio=2, bias_resampling="interpolate", bias_grid=(4, 4), pretrain_grid=4)
    extrapolating = AggregatedAttention(8, 2, pool_ratio=2, pretrain_grid=4)
    extrapolating.load_state_dict(randomised(block).state_dict())
    x = torch.randn(1, *grid, 8)
    equal = torch.allclose(block(x), extrapolating(x), atol=1e-6)
    assert equal == (grid == (4, 4))

    declared = extrapolating.log_cpb((4, 4), (2, 2), (4, 4)).dense().unflatten(2, (2, 2))
    key_grid = block.key_grid(grid)
    keys = torch.nn.functional.interpolate(declared, key_grid, mode="bilinear").flatten(2)
    maps = keys.unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    queries = torch.nn.functional.interpolate(maps, grid, mode="bilinear").flatten(2).transpose(1, 2)
    assert_near(block._pool_bias(torch.empty(1, *grid, block.dim)).dense(), queries)


@pytest.mark.parametrize(
    "switches",
    [
        {},
        ALL_ON,
        {**ALL_ON, "window_bias": "log-cpb"},
        {"pool_bias": "learned", "pool_grid": (2, 3)},
        {**ALL_ON, "bias_resampling": "interpolate", "bias_grid": (2, 4)},
    ],
    ids=["plain", "everything", "window log-CPB", "learned pool bias", "interpolated"],
)
@pytest.mark.parametrize("training", [False, True])
def test_gradients_numerically(switches, training):
    block = randomised(PixelFocusedAttention(4, 2, pool_ratio=2, **switches)).train(training)
    gradcheck_module(block, torch.randn(1, 4, 5, 4))


def test_dropout_of_weights_and_output_in_training_only():
    block = AggregatedAttention(8, 2, attn_drop=0.5, proj_drop=0.5)
    x = torch.randn(1, 5, 5, 8)
    assert not torch.equal(block(x), block(x))
    assert (block(x) == 0).float().mean() > 0.2
    block.eval()
    assert torch.equal(block(x), block(x))


def test_attention_dropout_keeps_the_mean():
    block = PixelFocusedAttention(4, 1, attn_drop=0.3, window_bias=None, pool_bias=None)
    x = torch.randn(1, 3, 3, 4).expand(4096, -1, -1, -1)
    with torch.no_grad():
        dropped = block(x).mean(0)
        assert_near(dropped, block.eval()(x[0][None])[0], tol=0.05)


def test_a_replaced_projection_is_called():
    """A qkv that is no plain Linear, as quantisation or adapters leave it, keeps its own forward on both paths."""

    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    block = randomised(AggregatedAttention(8, 2)).eval()
    doubled = AggregatedAttention(8, 2).eval()
    doubled.qkv = Doubled(8, 24)
    doubled.load_state_dict(block.state_dict())
    with torch.no_grad():
        block.qkv.weight *= 2
        block.qkv.bias *= 2
        x = torch.randn(1, 5, 5, 8)
        assert_near(doubled(x), block(x))


def test_aggregated_attention_is_pixel_focused_attention_with_everything_on():
    aggregated = randomised(AggregatedAttention(8, 2, pool_ratio=2))
    focused = PixelFocusedAttention(8, 2, pool_ratio=2, **ALL_ON)
    focused.load_state_dict(aggregated.state_dict())
    x = torch.randn(1, 5, 6, 8)
    assert torch.equal(aggregated(x), focused(x))


@pytest.mark.parametrize("switch", ["query_embedding", "positional_attention", "length_scaled"])
def test_aggregated_attention_without_one_of_its_parts(switch):
    block = randomised(AggregatedAttention(8, 2, pool_ratio=2, dtype=torch.float64, **{switch: False}))
    x = torch.randn(1, 4, 5, 8, dtype=torch.float64)
    switches = {"cosine": True, "length_scaled": switch != "length_scaled"}
    with torch.no_grad():
        assert_near(block(x), expected(block, x, **switches), tol=1e-9)
