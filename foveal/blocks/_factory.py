"""Calling a user's factories: with the arguments that they name, and errors that say where."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn


@contextmanager
def located(where: str) -> Iterator[None]:
    """Say in which slot of the spec an error arose, like "stage 2, block 5, mixer: ..."."""
    try:
        yield
    except (ValueError, TypeError, AssertionError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{where}: {error}") from error


def call(factory: Callable[..., nn.Module], *args: Any, offered: Mapping[str, Any], where: str) -> nn.Module:
    """Build a module from ``factory(*args)``, with those of the offered keyword arguments that its signature names.

    Arguments fixed by a ``partial`` stay as they are. A module that took no device or dtype is moved there.
    """
    with located(where):
        if not callable(factory) or isinstance(factory, nn.Module):
            raise TypeError(f"expected a factory, a callable that returns a module, got {factory!r}")
        taken = _named(factory)
        module = factory(*args, **{name: value for name, value in offered.items() if name in taken})
        if not isinstance(module, nn.Module):
            raise TypeError(f"expected {factory!r} to return a torch.nn.Module, got {type(module).__name__}")
    device, dtype = (None if name in taken else offered.get(name) for name in ("device", "dtype"))
    return module if device is None and dtype is None else module.to(device=device, dtype=dtype)


def _named(factory: Callable) -> set[str]:
    """The parameters that a factory names and that no partial has fixed."""
    fixed: set[str] = set()
    layer = factory
    while isinstance(layer, partial):
        fixed |= set(layer.keywords)
        layer = layer.func
    kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        parameters = inspect.signature(factory).parameters.values()
    except ValueError:  # a callable without a signature names nothing
        return set()
    return {p.name for p in parameters if p.kind in kinds} - fixed
