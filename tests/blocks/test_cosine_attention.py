"""Length-scaled cosine attention and its switches, against a cell-by-cell computation."""

import pytest
import torch
import torch.nn.functional as F

from foveal.blocks import LengthScaledCosineAttention
from tests.blocks import naive
from tests.helpers import GRIDS, assert_near, gradcheck_module, randomised

SWITCHES = {
    "everything": {},
    "no query embedding": {"query_embedding": False},
    "no length scale": {"length_scaled": False},
    "no position bias": {"position_bias": None},
    "no qkv bias": {"qkv_bias": False},
    "pre-trained elsewhere": {"pretrain_grid": (9, 4)},
    "pre-trained on one cell": {"pretrain_grid": 1},
}


@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (4, 3)], ids=str)
@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
def test_every_switch_against_loops(switches, grid):
    block = randomised(LengthScaledCosineAttention(8, 2, dtype=torch.float64, **switches)).eval()
    pretrain = switches.get("pretrain_grid", grid)
    pretrain = (pretrain, pretrain) if isinstance(pretrain, int) else pretrain
    stated = {name: switches[name] for name in ("length_scaled", "position_bias") if name in switches}
    x = torch.randn(2, *grid, 8, dtype=torch.float64)
    with torch.no_grad():
        expected = torch.stack([naive.cosine_attention(block, one, pretrain, **stated) for one in x])
        assert_near(block(x), expected, tol=1e-9)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_shapes(grid):
    block = LengthScaledCosineAttention(12, 3)
    x = torch.randn(2, *grid, 12, requires_grad=True)
    out = block(x)
    out.square().sum().backward()
    assert out.shape == x.shape
    assert out.is_contiguous()
    assert out.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())


@pytest.mark.parametrize("grid", [(4, 4), (5, 7)], ids=str)
def test_interpolation_resamples_the_bias_of_the_declared_grid(grid):
    block = randomised(LengthScaledCosineAttention(8, 2, bias_resampling="interpolate", bias_grid=4))
    declared = block.log_cpb((4, 4), (4, 4), (4, 4)).dense()
    keys = F.interpolate(declared.unflatten(2, (4, 4)), grid, mode="bilinear").flatten(2)
    queries = F.interpolate(keys.unflatten(1, (4, 4)).permute(0, 3, 1, 2), grid, mode="bilinear")
    assert_near(block._bias(torch.empty(1, *grid, 8), torch.float32)[0], queries.flatten(2).transpose(1, 2))
    extrapolating = LengthScaledCosineAttention(8, 2, pretrain_grid=4)
    extrapolating.load_state_dict(block.state_dict())
    x = torch.randn(1, *grid, 8)
    assert torch.allclose(block(x), extrapolating(x), atol=1e-6) == (grid == (4, 4))


@pytest.mark.parametrize("training", [False, True])
def test_gradients_numerically(training):
    block = randomised(LengthScaledCosineAttention(4, 2)).train(training)
    gradcheck_module(block, torch.randn(1, 3, 4, 4))


def test_dropout_in_training_only():
    block = LengthScaledCosineAttention(8, 2, attn_drop=0.5)
    x = torch.randn(1, 5, 5, 8)
    assert not torch.equal(block(x), block(x))
    block.eval()
    assert torch.equal(block(x), block(x))
