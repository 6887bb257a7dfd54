"""Which implementation of an op runs: decided per call, from the inputs and from what the user asked for."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from foveal.ops._checks import check_choice

BACKENDS = ("auto", "compiled", "reference")

_chosen: ContextVar[str | None] = ContextVar("foveal_backend", default=None)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Choose the implementation of foveal's ops within a ``with`` block, over the environment's FOVEAL_BACKEND.

    Args:
        name: "auto" (compiled where it serves the inputs, else reference), "compiled" (raises with every reason
            where it cannot run) or "reference" (plain PyTorch).

    Example:
        >>> with foveal.ops.backend("reference"):
        ...     y = model(x)
    """
    check_choice("backend", name, BACKENDS)
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


def _environment_backend() -> str:
    name = os.environ.get("FOVEAL_BACKEND", "auto")
    check_choice("the environment variable FOVEAL_BACKEND", name, BACKENDS)
    return name


_default = _environment_backend()


def current_backend() -> str:
    """The backend in force: "auto", "compiled" or "reference"."""
    return _chosen.get() or _default
