"""Overlapping patch embedding."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from foveal.blocks import OverlapPatchEmbed
from tests.helpers import GRIDS, assert_near, gradcheck_module, randomised


@pytest.mark.parametrize("grid", [*GRIDS, (33, 65)], ids=str)
@pytest.mark.parametrize(("patch_size", "stride"), [(7, 4), (3, 2), (1, 1), (3, 3)])
def test_formula_and_rounding_up(grid, patch_size, stride):
    block = randomised(OverlapPatchEmbed(3, 6, patch_size=patch_size, stride=stride, dtype=torch.float64))
    x = torch.randn(2, *grid, 3, dtype=torch.float64)
    out = block(x)
    assert out.shape == (2, *(math.ceil(side / stride) for side in grid), 6)
    conv = F.conv2d(x.movedim(-1, 1), block.proj.weight, block.proj.bias, stride, patch_size // 2)
    assert_near(out, F.layer_norm(conv.movedim(1, -1), (6,), block.norm.weight, block.norm.bias), tol=1e-9)


def test_norm_layer():
    assert isinstance(OverlapPatchEmbed(3, 6, norm_layer=nn.Identity).norm, nn.Identity)


def test_gradients_numerically():
    gradcheck_module(randomised(OverlapPatchEmbed(2, 3, patch_size=3, stride=2)), torch.randn(1, 4, 5, 2))
