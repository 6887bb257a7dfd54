"""``python -m foveal`` reports what is installed and what would run; ``python -m foveal build`` builds the kernels."""

import argparse
import os
import platform
import re
import sys
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import timm
import torch

import foveal
from foveal.ops import current_backend
from foveal.ops.compiled import build, library, recipes, toolchain


def report() -> None:
    """Print versions, devices, and for each device whether the compiled kernels are there, and why not."""
    rows = {
        "foveal": foveal.__version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        "timm": timm.__version__,
        "backend": current_backend(),
    }
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        rows[f"cuda:{index}"] = f"{torch.cuda.get_device_name(index)}, compute capability {major}.{minor}"
    try:
        rows["cache"] = str(build.cache_directory())
        tools = toolchain.toolchain()
        rows["compiler"] = f"{tools.compiler} ({tools.version}) {tools.flags}".rstrip()
        rows["ninja"] = tools.ninja
    except build.BuildError as error:
        rows["toolchain"] = str(error)
    try:
        cuda = toolchain.cuda_toolchain()
        rows["nvcc"] = f"{cuda.nvcc} (CUDA {cuda.version}) {cuda.flags}".rstrip()
    except build.BuildError as error:
        rows["nvcc"] = f"none: {error}"
    for device in library.DEVICE_TYPES:
        rows[f"{device} kernels"] = library.describe(device)
    for name, value in rows.items():
        print(f"{name:14}{value}")


def build_counting_files(target: recipes.Target) -> Path:
    """``build.build``, which tells on a terminal's stderr how many of its files are compiled."""
    objects = build.cache_directory() / target.key / "objects"
    files = re.findall(r"^build (\S+):", target.rules, re.MULTILINE)
    with ThreadPoolExecutor(1) as worker:
        built = worker.submit(build.build, target, retry=True)
        while sys.stderr.isatty() and not wait([built], timeout=0.5).done:
            done = sum((objects / file).exists() for file in files)
            print(f"{done} of {len(files)} files", end="\r", file=sys.stderr, flush=True)
    return built.result()


def build_now() -> int:
    """Build the kernels, also where an earlier build failed; returns the exit status.

    Those of the GPU are built where there is one, or for the architectures in TORCH_CUDA_ARCH_LIST.
    """
    gpus_wanted = torch.cuda.is_available() or "TORCH_CUDA_ARCH_LIST" in os.environ
    status = 0
    for device in ("cpu", "cuda") if gpus_wanted else ("cpu",):
        try:
            print(build_counting_files(library.target(device)))
        except build.BuildError as error:
            print(f"foveal: {error}\n{error.details}", file=sys.stderr)
            status = 1
    return status


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m foveal", description=__doc__)
    parser.add_argument("command", nargs="?", choices=["report", "build"], default="report")
    if parser.parse_args().command == "build":
        return build_now()
    report()
    return 0


if __name__ == "__main__":
    sys.exit(main())
