"""Build the compiled library: with ninja, in seconds, into a cache that many processes may share.

Standard library alone, so that ``setup.py`` can use it. The library is written against PyTorch's stable ABI and needs
its headers, not its version: one file serves every torch from ``TORCH_TARGET`` on and every Python.
"""

import functools
import hashlib
import importlib.util
import os
import platform
import re
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
# What kernels (*_kernel.cpp) may be compiled for. A library built where it runs holds the widest that the CPU has; one
# built into a wheel holds all, and chooses at run time.
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
    return _hash(f"{FLAGS}{INSTRUCTION_SETS}", *sorted(SOURCES.glob("*.[hc]*")))


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


def usual_cache() -> Path:
    """``FOVEAL_CACHE_DIR``, else foveal in the user's cache directory. It may be read-only."""
    if chosen := os.environ.get("FOVEAL_CACHE_DIR"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "foveal"


def cache_directory() -> Path:
    """The usual cache or, where that is read-only, a directory of the user's own under /tmp."""
    usual = usual_cache()
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


def instruction_set() -> str:
    """The widest instruction set that this CPU has, at most the one that ``FOVEAL_CPU_ISA`` names."""
    known = list(INSTRUCTION_SETS.get(platform.machine(), {"baseline": ""}))
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    flags = next((line.split() for line in cpuinfo.splitlines() if line.startswith("flags")), [])
    needed = {"avx2": {"avx2", "fma"}, "avx512": {"avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl"}}
    had = [name for name in known if needed.get(name, set()) <= set(flags)]
    limit = os.environ.get("FOVEAL_CPU_ISA")
    return had[min(len(had) - 1, known.index(limit))] if limit in known else had[-1]


def library_name(device: str) -> str:
    return f"foveal_{device}-{source_hash()}.so"


def build_directory(tools: Toolchain, cache: Path | None = None) -> Path:
    """Where what this compiler builds with these flags for this kind of machine belongs in the cache."""
    return (cache or cache_directory()) / _hash(
        "\n".join((*tools, FLAGS, platform.machine(), instruction_set(), TORCH_TARGET))
    )


def find(device: str) -> Path | None:
    """The library if it is built: in the package, or in a cache."""
    packaged = Path(__file__).parent / library_name(device)
    if packaged.exists():
        return packaged
    tools = toolchain()
    for cache in (usual_cache(), cache_directory()):
        library = build_directory(tools, cache) / library_name(device)
        if library.exists():
            return library
    return None


def failure(device: str, tools: Toolchain) -> str | None:
    """What the last build of these sources by these tools said if it failed."""
    record = (build_directory(tools) / library_name(device)).with_suffix(".failed")
    return record.read_text() if record.exists() else None


def build(device: str, tools: Toolchain, *, retry: bool = False) -> Path:
    """The library in the cache, built if it is not there yet. A failure is remembered there, until ``retry``."""
    directory = build_directory(tools)
    library = directory / library_name(device)
    record = library.with_suffix(".failed")
    if library.exists():
        return library
    directory.mkdir(parents=True, exist_ok=True)
    with _locked(directory / "lock", _time_limit()):
        if library.exists():
            return library
        if record.exists() and not retry:
            raise BuildError(f"an earlier build failed ({record}); `python -m foveal build` tries again")
        print(f"foveal: building the {device} kernels, once, into {directory}", file=sys.stderr, flush=True)
        try:
            os.replace(compile_library(directory / "objects", tools, only=instruction_set()), library)
        except BuildError as error:
            record.write_text(f"{error}\n{error.details}")
            raise
        record.unlink(missing_ok=True)
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
            except OSError as error:
                raise BuildError(
                    f"{path} cannot be locked ({error}); set FOVEAL_CACHE_DIR to a local directory"
                ) from error
        yield


def compile_library(objects: Path, tools: Toolchain, *, only: str | None = None) -> Path:
    """Compile with ninja what is not yet compiled in the directory ``objects``; returns the finished library in it.

    Kernels are compiled for the instruction set ``only``, else for all of them.
    """
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        raise BuildError("PyTorch's headers were not found")
    objects.mkdir(parents=True, exist_ok=True)
    (objects / "build.ninja").write_text(_ninja_file(tools, Path(torch.origin).parent, only))
    command = [tools.ninja, "-C", str(objects)]
    if jobs := os.environ.get("MAX_JOBS"):
        command += ["-j", jobs]
    limit = _time_limit()
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=_clean_environment())
    except subprocess.TimeoutExpired:
        raise BuildError(f"the build took more than {limit:.0f} s") from None
    if result.returncode:
        raise BuildError(f"{tools.compiler} could not build the kernels", result.stdout + result.stderr)
    return objects / "library.so"


def _ninja_file(tools: Toolchain, torch: Path, only: str | None) -> str:
    sets = {name: flags for name, flags in INSTRUCTION_SETS[platform.machine()].items() if only in (None, name)}
    define = f"-DFOVEAL_ONLY={only}" if only else ""
    lines = [
        f"compile = {tools.compiler} {FLAGS} {define} -isystem {torch}/include {tools.flags}",
        "rule compile\n  command = $compile $extra -c $in -o $out",
        f"rule link\n  command = {tools.compiler} -shared {tools.flags} $in -L{torch}/lib -ltorch_cpu -o $out",
    ]
    objects = []
    for source in sorted(SOURCES.glob("*.cpp")):
        kernel = source.stem.endswith("_kernel")
        for name, flags in sets.items() if kernel else [("", "")]:
            # Named by contents: an object that exists is never stale, whatever its age.
            objects.append(f"{source.stem}{name and '.'}{name}-{_hash(*_with_headers(source))}.o")
            extra = f"{flags} -DFOVEAL_ISA={name}" if kernel else ""
            lines.append(f"build {objects[-1]}: compile {source}\n  extra = {extra}")
    lines.append(f"build library.so: link {' '.join(objects)}\n")
    return "\n".join(lines)


def _with_headers(source: Path) -> list[Path]:
    """A source and the headers beside it that it includes, directly or not."""
    found = [source]
    for file in found:
        names = re.findall(r'^#include "(.+)"', file.read_text(), re.MULTILINE)
        found += [SOURCES / name for name in names if SOURCES / name not in found]
    return found


def _hash(*parts: str | Path) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.read_bytes() if isinstance(part, Path) else part.encode())
    return digest.hexdigest()[:16]


def _time_limit() -> float:
    return float(os.environ.get("FOVEAL_BUILD_TIMEOUT", "300"))
