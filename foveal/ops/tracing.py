"""Whether a graph is being made, and shapes as integers in it, in every version of PyTorch that foveal runs on."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def is_exporting() -> bool:
    """Whether a graph is made that is to run without foveal: by torch.export or by torch.jit.trace.

    ``torch.compiler.is_exporting()`` would not do: in PyTorch 2.11 it answers yes in every graph of ``torch.compile``.
    """
    return torch.compiler._is_exporting_flag or torch._C._get_tracing_state() is not None


def shape_of(x: Tensor) -> Sequence[int]:
    """``x.shape``, in a trace of torch.jit as plain integers, so that the graph is for the traced size."""
    return x.shape if torch._C._get_tracing_state() is None else integers(lambda: x.shape)


def integers(sizes: Callable[[], Sequence[Any]]) -> Sequence[int]:
    """``sizes()``, in a trace of torch.jit as plain integers."""
    state = torch._C._get_tracing_state()
    if state is None:
        return sizes()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        return tuple(map(int, sizes()))
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]
