"""Activate and pool against its formula."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from foveal.blocks import ActivateAndPool
from tests.helpers import GRIDS, assert_near, gradcheck_module, randomised


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("pooled", [(1, 1), (2, 3), (7, 7), (4, 16)], ids=str)
@pytest.mark.parametrize("act_layer", [nn.GELU, nn.ReLU, nn.Tanh])
def test_formula(grid, pooled, act_layer):
    block = randomised(ActivateAndPool(6, act_layer=act_layer, dtype=torch.float64))
    x = torch.randn(2, *grid, 6, dtype=torch.float64)
    activated = act_layer()(F.linear(x, block.proj.weight, block.proj.bias)).movedim(-1, 1)
    mean = F.adaptive_avg_pool2d(activated, pooled).movedim(1, -1)
    expected = F.layer_norm(mean, (6,), block.norm.weight, block.norm.bias, eps=1e-5)
    assert_near(block(x, pooled), expected, tol=1e-9)


def test_norm_layer():
    block = ActivateAndPool(6, norm_layer=nn.RMSNorm)
    assert isinstance(block.norm, nn.RMSNorm)
    assert block(torch.randn(1, 4, 4, 6), (2, 2)).shape == (1, 2, 2, 6)


def test_gradients_numerically():
    class Pool(nn.Module):
        def __init__(self):
            super().__init__()
            self.pool = randomised(ActivateAndPool(3))

        def forward(self, x):
            return self.pool(x, (2, 3))

    gradcheck_module(Pool(), torch.randn(1, 5, 4, 3))
