"""Keeping what depends on sizes alone, or on a few small weights, from one call to the next."""

from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from typing import Any

import torch
from torch import Tensor

from foveal.ops.tracing import is_exporting


def may_keep_tensors() -> bool:
    """Whether a tensor made now is an ordinary one that later calls may read.

    It is not while compiling, exporting or tracing, under a dispatch mode (fake tensors, FLOP counting), inside a
    transform of ``torch.func``, or while a CUDA graph is captured.
    """
    return not (
        torch.compiler.is_compiling()
        or is_exporting()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.maybe_current_level() is not None
        or (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())
    )


def cached_by_size(function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """Remember the last results of a function of sizes and a device, as long as nobody writes into them."""

    @lru_cache(maxsize=128)
    def kept(*sizes: Any) -> tuple[tuple[Tensor, ...], list[int]]:
        with torch.inference_mode(False):
            return _with_versions(function(*sizes))

    @wraps(function)
    def wrapper(*sizes: Any) -> tuple[Tensor, ...]:
        if not may_keep_tensors():
            return function(*sizes)
        tensors, versions = kept(*sizes)
        if [x._version for x in tensors] == versions:
            return tensors
        kept.cache_clear()
        return kept(*sizes)[0]

    return wrapper


def _with_versions(tensors: Any) -> tuple[Any, list[int]]:
    return tensors, [x._version for x in tensors]


class KeptByContent:
    """Results of a function of weights, kept by what the weights hold.

    Names, identities and versions of tensors do not tell: fused optimisers, EMA and ``.data`` write without a trace. So
    a copy of the weights is kept beside each result, and compared.
    """

    def __init__(self, size: int = 4):
        self._size = size
        self._entries: dict[Any, tuple[list[Tensor], Any, list[int]]] = {}

    def get(self, key: tuple, weights: Sequence[Tensor], compute: Callable[[], Any]) -> Any:
        """The tensors of ``compute()``, or the kept ones if the weights, few and small, still hold the same values.

        Nobody may have written into the kept ones either.
        """
        kept, tensors, versions = self._entries.get(key, (None, (), []))
        if kept is None or [x._version for x in tensors] != versions or not _all_equal(kept, weights):
            with torch.inference_mode(False), torch.no_grad():
                kept = [weight.detach().clone() for weight in weights]
                tensors, versions = _with_versions(compute())
            self._entries.pop(key, None)
            while len(self._entries) >= self._size:
                self._entries.pop(next(iter(self._entries)), None)
            self._entries[key] = kept, tensors, versions
        return tensors

    def __reduce__(self) -> tuple:
        return KeptByContent, (self._size,)


def _all_equal(kept: Sequence[Tensor], weights: Sequence[Tensor]) -> bool:
    for a, b in zip(kept, weights, strict=True):
        if a.device != b.device or a.dtype != b.dtype or a.shape != b.shape:
            return False
    if weights[0].device.type == "cpu":
        return all(map(torch.equal, kept, weights))
    return bool(torch.stack([(a == b).all() for a, b in zip(kept, weights, strict=True)]).all())  # waits but once
