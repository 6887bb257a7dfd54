"""What the compiled libraries are made of: their sources, flags and names, as files for ninja.

They are written against PyTorch's stable ABI and need its headers, not its version: one file serves every torch from
``TORCH_TARGET`` on and every Python. Standard library alone, so that ``setup.py`` can use it.
"""

import hashlib
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from foveal.ops.compiled.toolchain import (
    INSTRUCTION_SETS,
    Architecture,
    Capability,
    CudaToolchain,
    Toolchain,
    cuda_toolchain,
    toolchain,
    torch_cuda_version,
    torch_directory,
)

SOURCES = Path(__file__).parent / "csrc"
TORCH_TARGET = "2.10"
_TORCH = "-DTORCH_TARGET_VERSION=0x020a000000000000"
CPU_FLAGS = (
    "-std=c++20 -O3 -g0 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -fno-semantic-interposition"
    f" -Wno-psabi {_TORCH}"
)
CUDA_FLAGS = f"-std=c++20 -O3 -Xcompiler -fPIC,-fvisibility=hidden {_TORCH} -DUSE_CUDA -DFOVEAL_CUDA"


class Target(NamedTuple):
    """A library to build. The name tells its sources and what it serves, the key what else it is made with."""

    device: str
    name: str
    key: str
    ninja: str  # the program
    rules: str  # its input


def cpu_target(instruction_set: str | None) -> Target:
    """The CPU's library, with kernels for one instruction set or, for None, all of them."""
    tools = toolchain()
    key = hash_of("\n".join((*tools, CPU_FLAGS, platform.machine(), str(instruction_set), TORCH_TARGET)))
    return Target("cpu", cpu_name(), key, tools.ninja, _cpu_rules(tools, instruction_set))


def cuda_target(archs: Sequence[Architecture]) -> Target:
    """The library for GPUs of these architectures, and for one major version of CUDA."""
    tools, cuda = toolchain(), cuda_toolchain()
    key = hash_of("\n".join((*tools, *cuda, CUDA_FLAGS, platform.machine(), str(archs), TORCH_TARGET)))
    name = f"foveal_cuda{_major(cuda.version)}_{'_'.join(map(str, archs))}-{_cuda_hash()}.so"
    return Target("cuda", name, key, tools.ninja, _cuda_rules(tools, cuda, archs))


def cpu_name() -> str:
    return f"foveal_cpu-{_source_hash(f'{CPU_FLAGS}{INSTRUCTION_SETS}', '*.h', 'cpu/*')}.so"


def cuda_libraries(directory: Path, gpus: Sequence[Capability]) -> list[Path]:
    """The libraries in a directory that are made of these sources and serve all of the GPUs and PyTorch's CUDA."""
    version = torch_cuda_version()
    found = directory.glob(f"foveal_cuda{_major(version)}_*-{_cuda_hash()}.so") if version else ()
    return [path for path in sorted(found) if all(serves(path, gpu) for gpu in gpus)]


def serves(library: Path, gpu: Capability) -> bool:
    """Whether a library, going by its name, holds code for a GPU of this compute capability."""
    names = library.name.partition("_")[2].partition("_")[2].partition("-")[0].split("_")
    return any(Architecture.named(name).serves(gpu) for name in names)


def _major(version: str) -> str:
    return version.split(".")[0]


def _cuda_hash() -> str:
    return _source_hash(CUDA_FLAGS, "*.h", "cuda/**/*.cu*")


def _source_hash(flags: str, *patterns: str) -> str:
    return hash_of(flags, *sorted(source for pattern in patterns for source in SOURCES.glob(pattern)))


def _cpu_rules(tools: Toolchain, only: str | None) -> str:
    sets = {name: flags for name, flags in INSTRUCTION_SETS[platform.machine()].items() if only in (None, name)}
    define, torch = f"-DFOVEAL_ONLY={only}" if only else "", torch_directory()
    lines = [
        f"compile = {tools.compiler} {CPU_FLAGS} {define} -I{SOURCES} -isystem {torch}/include {tools.flags}",
        "rule compile\n  command = $compile $extra -c $in -o $out",
        f"rule link\n  command = {tools.compiler} -shared {tools.flags} $in -L{torch}/lib -ltorch_cpu -o $out",
    ]
    objects = []
    for source in sorted(SOURCES.glob("cpu/*.cpp")):
        kernel = source.stem.endswith("_kernel")
        for name, flags in sets.items() if kernel else [("", "")]:
            objects.append(object_name(source, name))
            extra = f"{flags} -DFOVEAL_ISA={name}" if kernel else ""
            lines.append(f"build {objects[-1]}: compile {source}\n  extra = {extra}")
    lines.append(f"build library.so: link {' '.join(objects)}\n")
    return "\n".join(lines)


def _cuda_rules(tools: Toolchain, cuda: CudaToolchain, archs: Sequence[Architecture]) -> str:
    torch = torch_directory()
    generate = " ".join(arch.nvcc_flags for arch in archs)
    # Stand-ins for what PyTorch has loaded already when it loads this library, so that neither a GPU build of PyTorch
    # nor the toolkit's libraries are needed to link.
    loaded = ["libtorch_cuda.so", f"libcudart.so.{_major(cuda.version)}"]
    lines = [
        f"rule compile\n  command = {cuda.nvcc} {CUDA_FLAGS} -ccbin {tools.compiler} {generate}"
        f" -I{SOURCES} -isystem {torch}/include {cuda.flags} -c $in -o $out",
        f"rule standin\n  command = {tools.compiler} -shared -Wl,-soname,$out -x c /dev/null -o $out",
        f"rule link\n  command = {tools.compiler} -shared $in -Wl,--no-as-needed $libraries -L{torch}/lib -ltorch_cpu"
        " -o $out",
        *(f"build {name}: standin" for name in loaded),
    ]
    objects = []
    for source in sorted(SOURCES.glob("cuda/**/*.cu")):
        objects.append(object_name(source))
        lines.append(f"build {objects[-1]}: compile {source}")
    libraries = " ".join(f"-l:{name}" for name in loaded)
    lines.append(f"build library.so: link {' '.join(objects)} | {' '.join(loaded)}\n  libraries = -L. {libraries}\n")
    return "\n".join(lines)


def object_name(source: Path, variant: str = "") -> str:
    """Named by contents: an object that exists is never stale, whatever its age."""
    return f"{source.stem}{variant and '.'}{variant}-{hash_of(*_with_headers(source))}.o"


def _with_headers(source: Path) -> list[Path]:
    """A source and those of the headers below SOURCES that it includes, directly or not."""
    found = [source]
    for file in found:
        names = re.findall(r'^#include "(.+)"', file.read_text(), re.MULTILINE)
        headers = [header for name in names if (header := SOURCES / name).exists()]
        found += [header for header in headers if header not in found]
    return found


def hash_of(*parts: str | Path) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.read_bytes() if isinstance(part, Path) else part.encode())
    return digest.hexdigest()[:16]
