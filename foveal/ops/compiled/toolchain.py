"""The tools that build the compiled libraries, what they build for, or one line on what is missing.

Standard library alone, so that ``setup.py`` can use it.
"""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

# What CPU kernels (*_kernel.cpp) may be compiled for. A library built where it runs holds the widest that the CPU has;
# one built into a wheel holds all, and chooses at run time.
INSTRUCTION_SETS = {
    "x86_64": {
        "baseline": "",
        "avx2": "-mavx2 -mfma",
        "avx512": "-mavx2 -mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512",
    },
    "aarch64": {"baseline": ""},
}
SUPPORTED = sys.platform == "linux" and platform.machine() in INSTRUCTION_SETS
OLDEST_GPU = (8, 0)  # compute capability: the kernels use tensor cores and copies of that generation

Capability = tuple[int, int]


class BuildError(RuntimeError):
    """Why there is no compiled library, in one line; ``details`` holds the compiler's own words."""

    def __init__(self, reason: str, details: str = "") -> None:
        super().__init__(reason)
        self.details = details


class Toolchain(NamedTuple):
    compiler: str
    version: str
    ninja: str
    flags: str


class CudaToolchain(NamedTuple):
    nvcc: str
    version: str  # of CUDA, such as 13.0
    flags: str


def toolchain() -> Toolchain:
    """The compiler (``CXX``, else c++, g++ or clang++) and ninja, or a BuildError that says what is missing."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    compiler = next(filter(None, map(shutil.which, names)), None)
    if compiler is None:
        raise BuildError(f"no C++ compiler was found (tried {', '.join(names)})")
    ninja = shutil.which("ninja")
    if ninja is None and (spec := importlib.util.find_spec("ninja")) is not None and spec.origin is not None:
        # The package's own executable, where the environment's bin directory is not on the path.
        ninja = shutil.which("ninja", path=f"{Path(spec.origin).parent / 'data' / 'bin'}:{Path(sys.executable).parent}")
    if ninja is None:
        raise BuildError("ninja was not found (pip install ninja)")
    version = _output(compiler, "--version").splitlines()[0]
    return Toolchain(compiler, version, ninja, os.environ.get("FOVEAL_CXXFLAGS", ""))


def cuda_toolchain() -> CudaToolchain:
    """nvcc (``CUDACXX``, else on the path, in ``CUDA_HOME`` or /usr/local/cuda), or a BuildError.

    It must be of PyTorch's major version of CUDA. nvcc knows its toolkit's folders itself.
    """
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    names = [os.environ.get("CUDACXX"), "nvcc", *(f"{home}/bin/nvcc" for home in homes if home)]
    nvcc = next((path for name in names if name and (path := shutil.which(name))), None)
    if nvcc is None:
        raise BuildError("nvcc was not found on the path: install the CUDA toolkit, or name it in CUDACXX")
    release = re.search(r"release (\d+\.\d+)", _output(nvcc, "--version"))
    if release is None:
        raise BuildError(f"{nvcc} --version tells no release")
    wanted = torch_cuda_version()
    if wanted and (major := wanted.split(".")[0]) != release[1].split(".")[0]:
        raise BuildError(
            f"{nvcc} is of CUDA {release[1]}, and PyTorch of CUDA {wanted}: the major versions must agree; install "
            f"CUDA {major}'s toolkit and name its nvcc in CUDACXX"
        )
    return CudaToolchain(nvcc, release[1], os.environ.get("FOVEAL_NVCCFLAGS", ""))


def _output(command: str, option: str) -> str:
    result = subprocess.run([command, option], capture_output=True, text=True, env=clean_environment())
    if result.returncode:
        raise BuildError(f"{command} {option} failed")
    return result.stdout


def clean_environment() -> dict[str, str]:
    """For child processes: messages in English, and no library (a sanitizer's) preloaded into the compiler."""
    return {**{k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}, "LC_ALL": "C"}


def torch_directory() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise BuildError("PyTorch's headers were not found")
    return Path(spec.origin).parent


def torch_cuda_version() -> str | None:
    """The version of CUDA that the installed PyTorch was built with, without importing it."""
    found = re.search(r"^cuda\b[^=]*= '([\d.]+)'", (torch_directory() / "version.py").read_text(), re.MULTILINE)
    return found[1] if found else None


def instruction_set() -> str:
    """The widest instruction set that this CPU has, at most the one that ``FOVEAL_CPU_ISA`` names."""
    known = list(INSTRUCTION_SETS.get(platform.machine(), {"baseline": ""}))
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    flags = next((line.split() for line in cpuinfo.splitlines() if line.startswith("flags")), [])
    needed = {"avx2": {"avx2", "fma"}, "avx512": {"avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl"}}
    had = [name for name in known if needed.get(name, set()) <= set(flags)]
    limit = os.environ.get("FOVEAL_CPU_ISA")
    return had[min(len(had) - 1, known.index(limit))] if limit in known else had[-1]


class Architecture(NamedTuple):
    """One GPU architecture to compile for: 8.0, 9.0a (its own instructions too), 12.0+PTX (and what comes after)."""

    major: int
    minor: int
    own: bool = False
    ptx: bool = False

    @classmethod
    def parse(cls, text: str) -> "Architecture":
        found = re.fullmatch(r"(\d+)\.(\d)(a?)(\+PTX)?", text)
        if found is None:
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST must list architectures such as 8.0, 9.0a or 12.0+PTX, got {text!r}"
            )
        arch = cls(int(found[1]), int(found[2]), bool(found[3]), bool(found[4]))
        if (arch.major, arch.minor) < OLDEST_GPU:
            raise BuildError(f"TORCH_CUDA_ARCH_LIST holds {text}: the kernels need compute capability 8.0 or later")
        return arch

    @classmethod
    def named(cls, name: str) -> "Architecture":
        """The inverse of str()."""
        found = re.fullmatch(r"(\d+)(\d)(a?)(ptx)?", name)
        assert found, name
        return cls(int(found[1]), int(found[2]), bool(found[3]), bool(found[4]))

    def __str__(self) -> str:
        return f"{self.major}{self.minor}{'a' if self.own else ''}{'ptx' if self.ptx else ''}"

    @property
    def nvcc_flags(self) -> str:
        name = f"{self.major}{self.minor}{'a' if self.own else ''}"
        code = f"[sm_{name},compute_{name}]" if self.ptx else f"sm_{name}"
        return f"-gencode=arch=compute_{name},code={code}"

    def serves(self, capability: Capability) -> bool:
        """Whether a GPU of this compute capability runs what was compiled for this architecture."""
        if self.own:
            return capability == (self.major, self.minor)
        if self.ptx and capability >= (self.major, self.minor):
            return True
        return capability[0] == self.major and capability[1] >= self.minor


def architectures(gpus: list[Capability]) -> list[Architecture]:
    """What to compile for: TORCH_CUDA_ARCH_LIST, else these GPUs as far as they are served; or a BuildError."""
    if listed := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return sorted({Architecture.parse(text) for text in listed.replace(";", " ").split()})
    served = {gpu for gpu in gpus if gpu >= OLDEST_GPU}
    if not served:
        have = ", ".join(f"{major}.{minor}" for major, minor in gpus)
        raise BuildError(
            f"the kernels need compute capability 8.0 or later, these GPUs have {have}; they run on plain PyTorch"
            if gpus
            else "no GPU is visible; TORCH_CUDA_ARCH_LIST=8.0;9.0a (for example) builds for GPUs elsewhere"
        )
    return sorted(Architecture(*gpu, own=gpu == (9, 0)) for gpu in served)
