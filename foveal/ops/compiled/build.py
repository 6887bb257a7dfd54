"""Build a compiled library: with ninja, in seconds, into a cache that many processes may share.

Standard library alone, so that ``setup.py`` can use it.
"""

import os
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from foveal.ops.compiled.recipes import Target
from foveal.ops.compiled.toolchain import BuildError, clean_environment


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


def find(target: Target) -> Path | None:
    """The library if it is built: in a cache."""
    found = (cache / target.key / target.name for cache in (usual_cache(), cache_directory()))
    return next((library for library in found if library.exists()), None)


def failure(target: Target) -> str | None:
    """What the last build of these sources by these tools said if it failed."""
    record = (cache_directory() / target.key / target.name).with_suffix(".failed")
    return record.read_text() if record.exists() else None


def build(target: Target, *, retry: bool = False) -> Path:
    """The library in the cache, built if it is not there yet. A failure is remembered there, until ``retry``."""
    directory = cache_directory() / target.key
    library = directory / target.name
    record = library.with_suffix(".failed")
    if library.exists():
        return library
    directory.mkdir(parents=True, exist_ok=True)
    with _locked(directory / "lock", _time_limit()):
        if library.exists():
            return library
        if record.exists() and not retry:
            raise BuildError(f"an earlier build failed ({record}); `python -m foveal build` tries again")
        print(f"foveal: building the {target.device} kernels, once, into {directory}", file=sys.stderr, flush=True)
        try:
            os.replace(compile_library(directory / "objects", target), library)
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


def compile_library(objects: Path, target: Target) -> Path:
    """Compile with ninja what is not yet compiled in the directory ``objects``; returns the finished library in it."""
    run_ninja(objects, target)
    return objects / "library.so"


def run_ninja(objects: Path, target: Target) -> str:
    """What ninja said; a BuildError if it failed."""
    objects.mkdir(parents=True, exist_ok=True)
    (objects / "build.ninja").write_text(target.rules)
    command = [target.ninja, "-C", str(objects)]
    if jobs := os.environ.get("MAX_JOBS"):
        command += ["-j", jobs]
    limit = _time_limit()
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=clean_environment())
    except subprocess.TimeoutExpired:
        raise BuildError(f"the build took more than {limit:.0f} s") from None
    if result.returncode:
        raise BuildError(f"the {target.device} kernels do not compile", result.stdout + result.stderr)
    return result.stdout


def _time_limit() -> float:
    return float(os.environ.get("FOVEAL_BUILD_TIMEOUT", "300"))
