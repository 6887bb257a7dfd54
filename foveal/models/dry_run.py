"""What shape a module would return, without computing it: fake tensors through a fake copy of the module."""

import copy
from typing import Any

import torch
from torch import nn


def output_shape(module: nn.Module, shape: tuple[int, ...], device: Any = None, dtype: Any = None) -> tuple[int, ...]:
    """The shape of ``module(x)`` for x of a shape. The module itself is neither run nor changed.

    A module that cannot be followed without real data is trusted to keep its input's shape.
    """
    from torch._subclasses import fake_tensor

    mode = fake_tensor.FakeTensorMode()
    with fake_tensor.FakeCopyMode(mode):
        fake = copy.deepcopy(module).eval()
    with mode, torch.no_grad():
        try:
            return tuple(fake(torch.empty(shape, device=device, dtype=dtype)).shape)
        except (
            fake_tensor.DataDependentOutputException,
            fake_tensor.DynamicOutputShapeException,
            fake_tensor.UnsupportedOperatorException,
        ):
            return shape
