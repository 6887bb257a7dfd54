"""PVTv2's spatial-reduction attention against its formula."""

import pytest
import torch
import torch.nn.functional as F

from foveal.blocks import SpatialReductionAttention
from tests.helpers import GRIDS, assert_near, gradcheck_module, randomised


def formula(block, x, ratio):
    batch, height, width, dim = x.shape
    reduced = x
    if ratio > 1:
        padded = F.pad(x, (0, 0, 0, max(0, ratio - width), 0, max(0, ratio - height)))
        reduced = F.conv2d(padded.movedim(-1, 1), block.sr.weight, block.sr.bias, stride=ratio).movedim(1, -1)
        reduced = F.layer_norm(reduced, (dim,), block.norm.weight, block.norm.bias)
    heads, d = block.num_heads, dim // block.num_heads
    q = block.q(x).view(batch, -1, heads, d)
    k, v = block.kv(reduced).view(batch, -1, 2, heads, d).unbind(2)
    weights = (torch.einsum("bqnd,bknd->bnqk", q, k) / d**0.5).softmax(-1)
    return block.proj(torch.einsum("bnqk,bknd->bqnd", weights, v).reshape(x.shape))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("ratio", [1, 2, 4])
def test_formula(grid, ratio):
    block = randomised(SpatialReductionAttention(8, 2, sr_ratio=ratio, dtype=torch.float64))
    x = torch.randn(2, *grid, 8, dtype=torch.float64)
    assert_near(block(x), formula(block, x, ratio), tol=1e-9)


def test_ratio_of_one_has_neither_convolution_nor_norm():
    assert {name.split(".")[0] for name, _ in SpatialReductionAttention(8, 2).named_parameters()} == {"q", "kv", "proj"}


def test_qkv_bias_switch():
    block = SpatialReductionAttention(8, 2, qkv_bias=False)
    assert block.q.bias is None
    assert block.kv.bias is None


@pytest.mark.parametrize("ratio", [1, 2])
def test_gradients_numerically(ratio):
    gradcheck_module(randomised(SpatialReductionAttention(4, 2, sr_ratio=ratio)), torch.randn(1, 3, 4, 4))
