"""Build the compiled library: with ninja, in seconds, into a cache that many processes may share.

Standard library alone, so that ``setup.py`` can use it. The library is written against PyTorch's stable ABI and needs
its headers, not its version: one file serves every torch from ``TORCH_TARGET`` on and every Python.
"""

import functools
import hashlib
import importlib.util
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

SOURCES = Path(__file__).parent / "csrc"
TORCH_TARGET = "2.10"
FLAGS = (
    "-std=c++20 -O3 -g0 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -fno-semantic-interposition"
    " -Wno-psabi -DTORCH_TARGET_VERSION=0x020a000000000000"
)
# Kernels (*_kernel.cpp) are compiled once for each of these; the widest that the CPU has is chosen at run time.
INSTRUCTION_SETS = {
    "x86_64": {
        "baseline": "",
        "avx2": "-mavx2 -mfma",
        "avx512": "-mavx2 -mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512",
    },
    "aarch64": {"baseline": ""},
}
SUPPORTED = sys.platform == "linux" and platform.machine() in INSTRUCTION_SETS


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


@functools.cache
def source_hash() -> str:
    digest = hashlib.sha256(f"{FLAGS}{INSTRUCTION_SETS}".encode())
    for source in sorted(SOURCES.glob("*")):
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:16]


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
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, env=_clean_environment())
    if version.returncode:
        raise BuildError(f"{compiler} --version failed")
    return Toolchain(compiler, version.stdout.splitlines()[0], ninja, os.environ.get("FOVEAL_CXXFLAGS", ""))


def _clean_environment() -> dict[str, str]:
    """For child processes: messages in English, and no library (a sanitizer's) preloaded into the compiler."""
    return {**{k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}, "LC_ALL": "C"}


def cache_directory() -> Path:
    """``FOVEAL_CACHE_DIR``, else foveal in the user's cache directory, else, if that is read-only, one under /tmp."""
    chosen = os.environ.get("FOVEAL_CACHE_DIR")
    usual = Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "foveal"
    if _writable(usual):
        return usual
    fallback = Path(tempfile.gettempdir()) / f"foveal-{os.getuid()}"
    fallback.mkdir(mode=0o700, exist_ok=True)
    status = fallback.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise BuildError(f"neither {usual} nor {fallback} is a directory that this user alone can write")
    return fallback


def _writable(directory: Path) -> bool:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            return True
    except OSError:
        return False


def library_name(device: str) -> str:
    return f"foveal_{device}-{source_hash()}.so"


def build_directory(tools: Toolchain) -> Path:
    """Where these sources, built by this compiler for this machine, belong in the cache."""
    words = (source_hash(), tools.compiler, tools.version, tools.flags, platform.machine(), TORCH_TARGET)
    return cache_directory() / hashlib.sha256("\n".join(words).encode()).hexdigest()[:16]


def build(directory: Path, tools: Toolchain, *, device: str = "cpu", retry: bool = False) -> Path:
    """The library in ``directory``, built if it is not there yet. A failure is remembered there, until ``retry``."""
    library, failure = directory / library_name(device), directory / f"{device}.failed"
    if library.exists():
        return library
    directory.mkdir(parents=True, exist_ok=True)
    with _locked(directory / "lock", float(os.environ.get("FOVEAL_BUILD_TIMEOUT", "300"))):
        if library.exists():
            return library
        if failure.exists() and not retry:
            reason = f"an earlier build failed ({failure}); `python -m foveal build` tries again"
            raise BuildError(reason, failure.read_text())
        print(f"foveal: building the {device} kernels, once, into {directory}", file=sys.stderr, flush=True)
        try:
            compile_library(library, tools)
        except BuildError as error:
            failure.write_text(f"{error}\n{error.details}")
            raise
        failure.unlink(missing_ok=True)
    return library


@contextmanager
def _locked(path: Path, seconds: float) -> Iterator[None]:
    """Hold the lock on a file, which ends with the process that holds it, or raise after ``seconds``."""
    import fcntl  # Linux alone has a compiled library

    deadline = time.monotonic() + seconds
    with open(path, "a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise BuildError(f"another process has held {path} for {seconds:.0f} s") from None
                time.sleep(0.05)
            except OSError:
                break  # No locks on this file system: build on our own. The finished file is moved into place whole.
        yield


def compile_library(library: Path, tools: Toolchain) -> None:
    """Compile all sources with ninja and move the finished library into place."""
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        raise BuildError("PyTorch's headers were not found")
    root = Path(torch.origin).parent
    with tempfile.TemporaryDirectory(dir=library.parent, prefix="build-") as scratch:
        (Path(scratch) / "build.ninja").write_text(_ninja_file(tools, root))
        command = [tools.ninja, "-C", scratch]
        if jobs := os.environ.get("MAX_JOBS"):
            command += ["-j", jobs]
        limit = float(os.environ.get("FOVEAL_BUILD_TIMEOUT", "300"))
        try:
            result = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=_clean_environment())
        except subprocess.TimeoutExpired:
            raise BuildError(f"the build took more than {limit:.0f} s") from None
        if result.returncode:
            raise BuildError(f"{tools.compiler} could not build the kernels", result.stdout + result.stderr)
        os.replace(Path(scratch) / "library.so", library)


def _ninja_file(tools: Toolchain, torch: Path) -> str:
    includes = f"-isystem {torch / 'include'}"
    lines = [
        f"rule compile\n  command = {tools.compiler} {FLAGS} $extra {includes} {tools.flags} -c $in -o $out",
        f"rule link\n  command = {tools.compiler} -shared {tools.flags} $in -L{torch / 'lib'} -ltorch_cpu -o $out",
    ]
    objects = []
    for source in sorted(SOURCES.glob("*.cpp")):
        variants = {"": ""}
        if source.stem.endswith("_kernel"):
            variants = INSTRUCTION_SETS[platform.machine()]
        for name, flags in variants.items():
            extra = f"{flags} -DFOVEAL_ISA={name}" if name else ""
            objects.append(f"{source.stem}{name and '.'}{name}.o")
            lines.append(f"build {objects[-1]}: compile {source}\n  extra = {extra}")
    lines.append(f"build library.so: link {' '.join(objects)}\n")
    return "\n".join(lines)
