"""Compile the CUDA kernels for three generations of GPUs: no warnings, no spills, and room for the blocks they plan.

A kernel states its block's threads and the blocks that a multiprocessor is meant to hold (FOVEAL_OCCUPANCY); here its
registers are held against that. The library must use PyTorch's stable ABI alone. Prints a table; exits with 1 if
anything is wrong. Without nvcc it says so and checks nothing.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ARCHITECTURES = "8.0;9.0a;10.0"
REGISTERS = 65536  # of a multiprocessor, handed out to warps by 256

os.environ["TORCH_CUDA_ARCH_LIST"] = ARCHITECTURES
os.environ["FOVEAL_NVCCFLAGS"] = "-Xptxas -v -Werror all-warnings --keep --keep-dir ."
os.environ.setdefault("FOVEAL_BUILD_TIMEOUT", "900")

from foveal.ops.compiled import build, recipes, toolchain  # noqa: E402


def planned_occupancy(objects: Path) -> dict[str, tuple[int, int]]:
    """Threads of a block and blocks of a multiprocessor by kernel, as the compiler took them into its PTX."""
    found = {}
    for file in objects.glob("*.ptx"):
        for entry in re.finditer(
            r"^(?:\.visible )?\.entry (\w+)\((.*?)^\{", file.read_text(), re.MULTILINE | re.DOTALL
        ):
            threads = re.search(r"\.maxntid (\d+)", entry[2])
            blocks = re.search(r"\.minnctapersm (\d+)", entry[2])
            found[entry[1]] = (int(threads[1]) if threads else 0, int(blocks[1]) if blocks else 0)
    return found


def unstable_symbols(library: Path) -> list[str]:
    """What the library expects of Python or of PyTorch's C++ classes, which differ between their versions."""
    listing = subprocess.run(
        ["nm", "-D", "-C", "--undefined-only", library], capture_output=True, text=True, check=True
    ).stdout
    names = [line.split(maxsplit=1)[1] for line in listing.splitlines()]
    return [name for name in names if re.match(r"_?Py|(c10|at|torch|caffe2)::", name)]


def check(objects: Path) -> int:
    try:
        target = recipes.cuda_target(toolchain.architectures([]))
        log = build.run_ninja(objects, target)
    except build.BuildError as error:
        if error.details:
            print(f"{error}\n{error.details}")
            return 1
        print(f"NOT CHECKED, the CUDA kernels are not compiled here: {error}")
        return 0
    plans, wrong = planned_occupancy(objects), []
    pattern = r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes stack.*?(\d+) bytes spill.*?Used (\d+) reg"
    kernels = re.findall(pattern, log, re.DOTALL)
    names = subprocess.run(
        ["c++filt"], input="\n".join(k[0] for k in kernels), capture_output=True, text=True, check=True
    )
    for (mangled, arch, stack, spilled, registers), name in zip(kernels, names.stdout.splitlines(), strict=True):
        threads, blocks = plans[mangled]
        warps = (threads + 31) // 32 * blocks
        needed = (int(registers) + 7) // 8 * 8 * 32 * warps
        name = re.sub(r"foveal::(cuda::)?|\(anonymous namespace\)::|^void |\(.*\)$", "", name)
        row = f"{arch:7} {name:44} {registers:>3} registers, {blocks} blocks of {threads} threads"
        problems = [
            *(["no FOVEAL_OCCUPANCY"] if not blocks else []),
            *([f"{stack} bytes of stack, {spilled} spilled"] if int(stack) or int(spilled) else []),
            *([f"its plan needs {needed} registers of {REGISTERS}"] if needed > REGISTERS else []),
        ]
        print(row, *(f"<- {problem}" for problem in problems))
        wrong += problems
    if len(kernels) != 3 * len(plans) or not kernels:
        wrong.append(f"ptxas reported {len(kernels)} kernels, the PTX holds {len(plans)} for each of 3 architectures")
        print(wrong[-1])
    if unstable := unstable_symbols(objects / "library.so"):
        wrong.append(f"the library uses more of PyTorch than its stable ABI, or Python: {unstable}")
        print(wrong[-1])
    return 1 if wrong else 0


def main() -> int:
    with tempfile.TemporaryDirectory() as directory:
        return check(Path(directory))


if __name__ == "__main__":
    sys.exit(main())
