"""``python -m foveal`` reports what is installed and what would run; ``python -m foveal build`` builds the kernels."""

import argparse
import platform
import sys

import timm
import torch

import foveal
from foveal.ops import build, current_backend, library


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
        rows[f"cuda:{index}"] = torch.cuda.get_device_name(index)
    try:
        rows["cache"] = str(build.cache_directory())
        tools = build.toolchain()
        rows["compiler"] = f"{tools.compiler} ({tools.version}) {tools.flags}".rstrip()
        rows["ninja"] = tools.ninja
    except build.BuildError as error:
        rows["toolchain"] = str(error)
    for device in ("cpu", "cuda"):
        rows[f"{device} kernels"] = library.describe(device)
    for name, value in rows.items():
        print(f"{name:14}{value}")


def build_now() -> int:
    """Build the kernels, also where an earlier build failed; returns the exit status."""
    try:
        tools = build.toolchain()
        for device in library.DEVICES:
            print(build.build(device, tools, retry=True))
    except build.BuildError as error:
        print(f"foveal: {error}\n{error.details}", file=sys.stderr)
        return 1
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m foveal", description=__doc__)
    parser.add_argument("command", nargs="?", choices=["report", "build"], default="report")
    if parser.parse_args().command == "build":
        return build_now()
    report()
    return 0


if __name__ == "__main__":
    sys.exit(main())
