"""The compiled library in this process: loaded at the first use of an op, or the reason why it is not."""

import os
import threading
import warnings
from pathlib import Path

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


def find(device: str) -> Path | None:
    """The library if it is built: in the package, or in the cache."""
    packaged = Path(__file__).parent / build.library_name(device)
    if packaged.exists():
        return packaged
    cached = build.build_directory(build.toolchain()) / build.library_name(device)
    return cached if cached.exists() else None


def _load(device: str, *, may_build: bool) -> str | None:
    if device not in DEVICES:
        return f"there are no compiled kernels for {device} tensors"
    if not build.SUPPORTED:
        return "compiled kernels are for Linux on x86-64 and Arm"
    with _lock:
        if device in _reasons:
            return _reasons[device]
        try:
            library = find(device)
            if library is None:
                if not may_build:
                    return "the library is not built yet, and a build does not start while a graph is traced"
                tools = build.toolchain()
                library = build.build(build.build_directory(tools), tools, device=device)
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
