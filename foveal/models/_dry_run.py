"""What shape a module would return, without computing it: fake tensors through a fake copy of the module."""

import copy
from typing import Any

import torch
from torch import Tensor, nn


def output_shape(module: nn.Module, shape: tuple[int, ...], device: Any = None, dtype: Any = None) -> tuple[int, ...]:
    """The shape of ``module(x)`` for x of a shape. The module itself is neither run nor changed.

    A module that looks at the values of its input is run on zeros, in a copy. The input is on the device, and of the
    dtype, of the module's own parameters, even if ``device`` or ``dtype`` says otherwise; those are for one without.

    Raises:
        ValueError: where the module fails on such an input.
        TypeError: where it returns no tensor.
    """
    from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

    own = next((p for p in module.parameters() if p.is_floating_point()), None)
    if own is not None:
        device, dtype = own.device, own.dtype
    mode = FakeTensorMode()
    try:
        with FakeCopyMode(mode):
            fake = copy.deepcopy(module)
        with mode:
            out = _run(fake, torch.empty(shape, device=device, dtype=dtype))
    except Exception:
        try:
            out = _run(copy.deepcopy(module), torch.zeros(shape, device=device, dtype=dtype))
        except Exception as error:
            raise ValueError(f"fails on an input of shape {shape}: {type(error).__name__}: {error}") from error
    if not isinstance(out, Tensor):
        raise TypeError(f"must return a tensor, got {type(out).__name__}")
    return tuple(out.shape)


@torch.no_grad()
def _run(module: nn.Module, x: Tensor) -> Any:
    return module.eval()(x)
