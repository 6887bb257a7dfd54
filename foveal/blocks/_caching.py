"""Keeping what depends on sizes alone, or on weights that stand still, from one call to the next."""

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any

import torch
from torch import nn


def may_keep_tensors() -> bool:
    """Whether a tensor made now is an ordinary one that later calls may read.

    It is not while compiling or exporting, under a dispatch mode (fake tensors, FLOP counting), inside a transform of
    ``torch.func``, or while a CUDA graph is captured.
    """
    return not (
        torch.compiler.is_compiling()
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


def _parameters_of(module: nn.Module) -> list[nn.Parameter]:
    """``list(module.parameters())`` in a quarter of the time."""
    found = [p for p in module._parameters.values() if p is not None]
    for part in module._modules.values():
        if part is not None:
            found += _parameters_of(part)
    return found


class WeightedCache:
    """Results that depend on a module's parameters, kept while the parameters stand still.

    An entry is keyed on the identity and version of the parameters. Writes through ``.data`` change neither: call
    :meth:`clear` (or ``module.train()`` and ``module.eval()``) after them.
    """

    def __init__(self, size: int = 4):
        self._size = size
        self._entries: dict[Any, tuple[list[nn.Parameter], Any]] = {}

    def get(self, module: nn.Module, key: tuple, compute: Callable[[], Any]) -> Any:
        parameters = _parameters_of(module)
        if not self._serves(module, parameters):
            return compute()
        key = (*key, *[(id(p), p._version) for p in parameters])
        entry = self._entries.get(key)
        if entry is None:
            with torch.inference_mode(False), torch.no_grad():
                entry = parameters, compute()
            for oldest in list(self._entries)[: 1 - self._size or None]:
                self._entries.pop(oldest, None)
            self._entries[key] = entry
        return entry[1]

    @staticmethod
    def _serves(module: nn.Module, parameters: list[nn.Parameter]) -> bool:
        return (
            not module.training
            and may_keep_tensors()
            and all(type(p) is nn.Parameter and not p.is_inference() for p in parameters)
            and not (torch.is_grad_enabled() and any(p.requires_grad for p in parameters))
        )

    def clear(self) -> None:
        self._entries.clear()

    def __reduce__(self) -> tuple:
        return WeightedCache, (self._size,)
