"""How the paper's published models draw their weights."""

import math

from torch import nn


def init_linear(linear: nn.Linear) -> None:
    """Truncated normal of standard deviation 0.02, bias 0."""
    nn.init.trunc_normal_(linear.weight, std=0.02)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


def init_convolution(layer: nn.Conv2d | nn.Linear) -> None:
    """Normal with variance 2 / fan-out, bias 0. A Linear counts as a 1 x 1 convolution."""
    fan_out = layer.weight.shape[0] * layer.weight[0, 0].numel()
    nn.init.normal_(layer.weight, std=math.sqrt(2 * getattr(layer, "groups", 1) / fan_out))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
