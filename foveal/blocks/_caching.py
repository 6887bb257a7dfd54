"""Keeping what depends on sizes alone, or on a few small weights, from one call to the next."""

from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from typing import Any

import torch
from torch import Tensor


def may_keep_tensors() -> bool:
    """Whether a tensor made now is an ordinary one that later calls may read.

    It is not while compiling, exporting or tracing, under a dispatch mode (fake tensors, FLOP counting), inside a
    transform of ``torch.func``, or while a CUDA graph is captured.
    """
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.maybe_current_level() is not None
        or (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())
    )


def cached_by_size(function: Callable[..., Any]) -> Callable[..., Any]:
    """Remember the last results of a function of sizes and a device."""

    @lru_cache(maxsize=128)
    def kept(*sizes: Any) -> Any:
        with torch.inference_mode(False):
            return function(*sizes)

    @wraps(function)
    def wrapper(*sizes: Any) -> Any:
        return kept(*sizes) if may_keep_tensors() else function(*sizes)

    return wrapper


class KeptByContent:
    """Results of a function of weights, kept by what the weights hold.

    Names, identities and versions of tensors do not tell: fused optimisers, EMA and ``.data`` write without a trace. So
    a copy of the weights is kept beside each result, and compared.
    """

    def __init__(self, size: int = 4):
        self._size = size
        self._entries: dict[Any, tuple[list[Tensor], Any]] = {}

    def get(self, key: tuple, weights: Sequence[Tensor], compute: Callable[[], Any]) -> Any:
        """``compute()``, or what it returned when the weights, few and small, held the same on the same device."""
        entry = self._entries.get(key)
        if entry is None or not _all_equal(entry[0], weights):
            with torch.inference_mode(False), torch.no_grad():
                entry = [weight.detach().clone() for weight in weights], compute()
            self._entries.pop(key, None)
            for oldest in list(self._entries)[: 1 - self._size or None]:
                self._entries.pop(oldest, None)
            self._entries[key] = entry
        return entry[1]

    def __reduce__(self) -> tuple:
        return KeptByContent, (self._size,)


def _all_equal(kept: Sequence[Tensor], weights: Sequence[Tensor]) -> bool:
    for a, b in zip(kept, weights, strict=True):
        if a.device != b.device or a.dtype != b.dtype or a.shape != b.shape:
            return False
    if weights[0].device.type == "cpu":
        return all(map(torch.equal, kept, weights))
    return bool(torch.stack([(a == b).all() for a, b in zip(kept, weights, strict=True)]).all())  # waits but once
