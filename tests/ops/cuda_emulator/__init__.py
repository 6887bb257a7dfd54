"""The CUDA kernels on the host: their sources compiled by the C++ compiler, every thread of a block a fiber.

``emulated_cuda.h`` says what this can show and what not. The library registers the kernels for CUDA tensors, as the
real one does; :func:`emulated` runs them on CPU tensors in place of foveal's ops.
"""

import platform
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from foveal.ops import backend
from foveal.ops.backend import COMPILED_DTYPES
from foveal.ops.compiled import build, library, recipes, toolchain

HERE = Path(__file__).parent
FLAGS = (
    "-std=c++20 -O1 -fPIC -fvisibility=hidden -fno-strict-aliasing -Wno-psabi -Wall -Werror -Wno-unknown-pragmas"
    " -Wno-unused-but-set-parameter -DTORCH_TARGET_VERSION=0x020a000000000000 -DFOVEAL_CUDA"
    " -DFOVEAL_GATE_CHUNK=8192 -ffp-contract=fast"  # a * b + c is rounded once, as by nvcc
)


def _flags() -> str:
    wide = toolchain.instruction_set() != "baseline"
    return f"{FLAGS} {toolchain.INSTRUCTION_SETS[platform.machine()]['avx2' if wide else 'baseline']}"


def _target() -> recipes.Target:
    tools, torch_at, flags = toolchain.toolchain(), toolchain.torch_directory(), _flags()
    headers = recipes.hash_of(flags, *sorted(HERE.glob("*.h")))
    sources = [HERE / "emulator.cpp", HERE / "probes.cu", *sorted(recipes.SOURCES.rglob("*.cu"))]
    objects = {recipes.object_name(source, headers): source for source in sources}
    rules = [
        f"rule compile\n  command = {tools.compiler} {flags} -I{HERE} -I{recipes.SOURCES} -isystem {torch_at}/include"
        " -x c++ -c $in -o $out",
        f"rule link\n  command = {tools.compiler} -shared $in -L{torch_at}/lib -ltorch_cpu -o $out",
        *(f"build {name}: compile {source}" for name, source in objects.items()),
        f"build library.so: link {' '.join(objects)}\n",
    ]
    name = f"foveal_emulated-{recipes.hash_of(*objects)}.so"
    return recipes.Target("emulated cuda", name, recipes.hash_of(*tools, flags), tools.ninja, "\n".join(rules))


def why_not() -> str | None:
    """Why the emulated kernels cannot run, or None if they can. Builds and loads them."""
    if torch.cuda.is_available():
        return "there is a GPU, whose kernels take the place of the emulated ones (hide it: CUDA_VISIBLE_DEVICES=)"
    if not toolchain.SUPPORTED:
        return "no compiled library on this platform"
    try:
        torch.ops.load_library(build.build(_target(), retry=True))
    except build.BuildError as error:
        if error.details:
            raise RuntimeError(f"{error}\n{error.details}") from None
        return str(error)
    return None


needs_emulator = pytest.mark.usefixtures("emulator")  # of conftest.py


class _OnEmulatedDevice(TorchDispatchMode):
    """Below autograd, where an op's implementation is chosen by the device: that of CUDA for foveal's ops."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        if func.namespace == "foveal" and torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"):
            self.ran.add(name.removeprefix("foveal::"))
            return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@contextmanager
def emulated():
    """Within it, foveal's compiled ops run the CUDA kernels. Yields the set of names of those that did."""
    mode = _OnEmulatedDevice()
    with (
        mock.patch.dict(COMPILED_DTYPES, cpu=COMPILED_DTYPES["cuda"]),
        mock.patch.dict(library._reasons, cpu=None),
        backend("compiled"),
        mode,
    ):
        yield mode.ran
