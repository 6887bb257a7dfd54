"""The compiled library in this process: loaded at the first use of an op, or the reason why it is not."""

import os
import threading
import warnings

import torch

from foveal.ops import build

DEVICES = ("cpu",)

_reasons: dict[str, str | None] = {}  # by device: None once its kernels are loaded, else why they are not
_lock = threading.Lock()


def why_not(device: str) -> str | None:
    """Why the kernels of a device type cannot run, or None if they can. The first call finds, builds and loads them."""
    try:
        return _reasons[device]
    except KeyError:
        return _load(device, may_build=True)


@torch.compiler.assume_constant_result
def why_not_while_tracing(device: str) -> str | None:
    """The same for a graph that is being traced: loads a library that is built already, and starts no build."""
    return _reasons[device] if device in _reasons else _load(device, may_build=False)


def describe(device: str) -> str:
    """One line on the state of a device's kernels; builds nothing and loads nothing."""
    if device not in DEVICES:
        return f"none: there are no compiled kernels for {device} tensors"
    try:
        if not build.SUPPORTED:
            raise build.BuildError("compiled kernels are for Linux on x86-64 and Arm")
        library = build.find(device)
        if library is not None:
            return f"built: {library}"
        failure = build.failure(device, build.toolchain())
        return f"none: {failure}" if failure else "not built yet: an op's first use or `python -m foveal build` does it"
    except build.BuildError as error:
        return f"none: {error}"


def _load(device: str, *, may_build: bool) -> str | None:
    if device not in DEVICES:
        return f"there are no compiled kernels for {device} tensors"
    if not build.SUPPORTED:
        return "compiled kernels are for Linux on x86-64 and Arm"
    with _lock:
        if device in _reasons:
            return _reasons[device]
        try:
            library = build.find(device)
            if library is None:
                if not may_build:
                    return "the library is not built yet, and a build does not start while a graph is traced"
                library = build.build(device, build.toolchain())
            torch.ops.load_library(library)
            _reasons[device] = None
        except (OSError, build.BuildError) as error:
            _reasons[device] = str(error)
            warnings.warn(
                f"foveal runs on plain PyTorch, several times slower than its compiled kernels: {error}. "
                "`python -m foveal` tells more; FOVEAL_BACKEND=reference silences this.",
                stacklevel=2,
            )
    return _reasons[device]


def _renew_lock() -> None:
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)  # another thread may have held it
