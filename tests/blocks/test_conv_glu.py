"""The gated linear units and ConvFFN against their formulas."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from foveal.blocks import GLU, ConvFFN, ConvGLU, ConvGLUType1, ConvGLUType2, ConvGLUType3
from tests.helpers import GRIDS, assert_near, gradcheck_module, randomised


def depthwise(block, x):
    weight = block.dwconv.weight
    out = F.conv2d(x.movedim(-1, 1), weight, block.dwconv.bias, padding=weight.shape[-1] // 2, groups=len(weight))
    return out.movedim(1, -1)


def value_and_gate(block, x):
    """A = x W1 + B1 and G = x W2 + B2; the gate's rows come first in fc1."""
    weight, bias, hidden = block.fc1.weight, block.fc1.bias, block.fc2.in_features
    return F.linear(x, weight[hidden:], bias[hidden:]), F.linear(x, weight[:hidden], bias[:hidden])


FORMULAS = {
    GLU: lambda block, a, g: a * F.gelu(g),
    ConvGLU: lambda block, a, g: a * F.gelu(depthwise(block, g)),
    ConvGLUType1: lambda block, a, g: a * depthwise(block, F.gelu(g)),
    ConvGLUType2: lambda block, a, g: depthwise(block, a) * F.gelu(g),
    ConvGLUType3: lambda block, a, g: depthwise(block, a * F.gelu(g)),
}
CONVOLUTIONAL = [ConvGLU, ConvGLUType1, ConvGLUType2, ConvGLUType3, ConvFFN]
EVERY = [GLU, *CONVOLUTIONAL]


def expected(block, x):
    if type(block) is ConvFFN:
        return F.linear(F.gelu(depthwise(block, block.fc1(x))), block.fc2.weight, block.fc2.bias)
    return F.linear(FORMULAS[type(block)](block, *value_and_gate(block, x)), block.fc2.weight, block.fc2.bias)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("layer", EVERY)
def test_formula(layer, grid):
    block = randomised(layer(6, 10, 7, dtype=torch.float64))
    x = torch.randn(2, *grid, 6, dtype=torch.float64)
    out = block(x)
    assert out.shape == (2, *grid, 7)
    assert_near(out, expected(block, x), tol=1e-9)


@pytest.mark.parametrize("layer", CONVOLUTIONAL)
@pytest.mark.parametrize("kernel_size", [1, 5])
def test_kernel_size(layer, kernel_size):
    block = randomised(layer(4, 6, kernel_size=kernel_size, dtype=torch.float64))
    x = torch.randn(1, 3, 5, 4, dtype=torch.float64)
    assert block.dwconv.weight.shape == (6, 1, kernel_size, kernel_size)
    assert_near(block(x), expected(block, x), tol=1e-9)


@pytest.mark.parametrize("layer", EVERY)
def test_widths(layer):
    block = layer(96)
    hidden = 384 if layer is ConvFFN else 256
    assert block.fc2.in_features == hidden
    assert block.fc1.out_features == (hidden if layer is ConvFFN else 2 * hidden)
    assert block.fc2.out_features == 96


@pytest.mark.parametrize("layer", EVERY)
def test_gradients_numerically(layer):
    gradcheck_module(randomised(layer(3, 4)), torch.randn(1, 3, 4, 3))


@pytest.mark.parametrize("layer", EVERY)
def test_dropout_stands_before_and_after_the_last_linear(layer):
    block = layer(4, 8, drop=0.5)
    x = torch.randn(1, 6, 6, 4)
    seen = []
    block.fc2.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    out = block(x)
    assert (seen[0] == 0).float().mean() > 0.3
    assert (out == 0).float().mean() > 0.3
    block.eval()
    assert torch.equal(block(x), block(x))


class MyGELU(nn.GELU):
    """The same function under a name that the ops do not know."""


class Swapped(nn.Module):
    def forward(self, x):
        return x.tanh()


def test_an_activation_of_ones_own_gives_the_fused_result():
    fused, own = randomised(ConvGLU(6, 8)), ConvGLU(6, 8, act_layer=MyGELU)
    own.load_state_dict(fused.state_dict())
    x = torch.randn(2, 5, 4, 6)
    assert_near(own(x), fused(x))


@pytest.mark.parametrize(
    ("act_layer", "function"),
    [
        (nn.ReLU, F.relu),
        (nn.SiLU, F.silu),
        (nn.Identity, lambda x: x),
        (lambda: nn.GELU("tanh"), lambda x: F.gelu(x, approximate="tanh")),
        (Swapped, torch.tanh),
        (lambda: nn.LeakyReLU(0.3), lambda x: F.leaky_relu(x, 0.3)),
    ],
)
def test_activations(act_layer, function):
    block = randomised(ConvGLU(4, 6, act_layer=act_layer, dtype=torch.float64))
    x = torch.randn(1, 4, 4, 4, dtype=torch.float64)
    value, gate = value_and_gate(block, x)
    assert_near(block(x), block.fc2(value * function(depthwise(block, gate))), tol=1e-9)
