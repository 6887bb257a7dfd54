"""The compiled libraries in this process: loaded at the first use of an op, or the reason why they are not.

A device is "cpu" or one GPU, "cuda:0".
"""

import os
import threading
import warnings
from pathlib import Path

import torch

from foveal.ops.compiled import build, recipes, toolchain
from foveal.ops.compiled.toolchain import BuildError

DEVICE_TYPES = ("cpu", "cuda")

_reasons: dict[str, str | None] = {}  # by device: None once its kernels are loaded, else why they are not
_lock = threading.Lock()


def why_not(device: str) -> str | None:
    """Why the kernels of a device cannot run, or None if they can. The first call finds, builds and loads them."""
    try:
        return _reasons[device]
    except KeyError:
        return _load(device, may_build=True)


@torch.compiler.assume_constant_result
def why_not_while_tracing(device: str) -> str | None:
    """The same for a graph that is being traced: loads a library that is built already, and starts no build."""
    return _reasons[device] if device in _reasons else _load(device, may_build=False)


def target(device_type: str) -> recipes.Target:
    """What this machine builds for its devices of a type; a BuildError says why it cannot."""
    if device_type == "cpu":
        return recipes.cpu_target(toolchain.instruction_set())
    return recipes.cuda_target(toolchain.architectures(_gpus()))


def describe(device_type: str) -> str:
    """One line on the state of a device type's kernels; builds nothing and loads nothing."""
    try:
        if reason := _unserved(device_type):
            raise BuildError(reason)
        if library := _find(device_type):
            return f"built: {library}"
        failure = build.failure(target(device_type))
        return f"none: {failure}" if failure else "not built yet: an op's first use or `python -m foveal build` does it"
    except BuildError as error:
        return f"none: {error}"


def _unserved(device_type: str) -> str | None:
    if device_type not in DEVICE_TYPES:
        return f"there are no compiled kernels for {device_type} tensors"
    if not toolchain.SUPPORTED:
        return "compiled kernels are for Linux on x86-64 and Arm"
    if device_type == "cuda" and torch.version.hip:
        return "there are no compiled kernels for ROCm"
    return None


def _gpus() -> list[toolchain.Capability]:
    return [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]


def _find(device_type: str) -> Path | None:
    """The library if it is built: in the package, or in a cache."""
    package = Path(__file__).parent
    if device_type == "cpu":
        packaged = [path for path in [package / recipes.cpu_name()] if path.exists()]
    else:
        packaged = recipes.cuda_libraries(package, [gpu for gpu in _gpus() if gpu >= toolchain.OLDEST_GPU])
    return packaged[0] if packaged else build.find(target(device_type))


def _load(device: str, *, may_build: bool) -> str | None:
    device_type = device.partition(":")[0]
    if reason := _unserved(device_type):
        return reason
    with _lock:
        if device in _reasons:
            return _reasons[device]
        try:
            library = _find(device_type)
            if library is None:
                if not may_build:
                    return "the library is not built yet, and a build does not start while a graph is traced"
                library = build.build(target(device_type))
            if device_type == "cuda":
                _check_gpu(device, library)
            torch.ops.load_library(library)
            _reasons[device] = None
        except (OSError, BuildError) as error:
            _reasons[device] = str(error)
            warnings.warn(
                f"foveal runs on plain PyTorch on {device}, several times slower than its compiled kernels: {error}. "
                "`python -m foveal` tells more; FOVEAL_BACKEND=reference silences this.",
                stacklevel=2,
            )
    return _reasons[device]


def _check_gpu(device: str, library: Path) -> None:
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < toolchain.OLDEST_GPU:
        raise BuildError(f"the kernels need compute capability 8.0 or later, {device} has {major}.{minor}")
    if not recipes.serves(library, (major, minor)):
        raise BuildError(f"{library} holds no code for the compute capability of {device}, {major}.{minor}")


def _renew_lock() -> None:
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)  # another thread may have held it
