"""What a call is traced for, in every version of PyTorch that foveal runs on."""

from collections.abc import Sequence

import torch
from torch import Tensor


def is_exporting() -> bool:
    """Whether a graph is made that is to run without foveal: by torch.export or by torch.jit.trace.

    ``torch.compiler.is_exporting()`` would not do: in PyTorch 2.11 it answers yes in every graph of ``torch.compile``.
    """
    return torch.compiler._is_exporting_flag or torch._C._get_tracing_state() is not None


def shape_of(x: Tensor) -> Sequence[int]:
    """``x.shape``, in a trace of torch.jit as plain integers: what depends on them holds for the traced size."""
    state = torch._C._get_tracing_state()
    if state is None:
        return x.shape
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        return tuple(x.shape)
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]
