"""Run timm's own model tests over foveal's models: ``python -m tests.timm_suite.run [more arguments of pytest]``.

The tests come with timm's source distribution, which is fetched once for the installed version. Two kinds are left out:

- "pretrained" ones download weights;
- "torchscript" ones: TorchScript does not take the blocks, whose forward branches on optional parameters and hands a
  named tuple to an op, and PyTorch has deprecated it. torch.compile and torch.export are tested instead.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import timm

HERE = Path(__file__).parent
CACHE = HERE.parents[1] / ".timm-tests"
SELECTION = "not pretrained and not torchscript"
TESTS_PER_MODEL = 8  # forward, backward, three of features, pruning, two of fx
TESTS_PER_HYBRID = 7  # a ViT has no pyramid of features
MODELS, HYBRIDS, ENTRIES = 6, 2, 10
EXPECTED = (
    MODELS * TESTS_PER_MODEL + HYBRIDS * TESTS_PER_HYBRID + ENTRIES
)  # and one for every entry, with weights or without


def fetch() -> Path:
    """A folder with timm's tests and pyproject.toml alone: its package would hide the installed one."""
    folder = CACHE / f"timm-{timm.__version__}"
    if folder.is_dir():
        return folder
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as work:
        requirement = f"timm=={timm.__version__}"
        command = [sys.executable, "-m", "pip", "download", "--no-binary", "timm", "--no-deps", "-d", work, requirement]
        if subprocess.run(command, check=False).returncode:
            raise SystemExit(f"The source distribution of {requirement}, which holds timm's tests, cannot be fetched.")
        (archive,) = Path(work).glob("*.tar.gz")
        with tarfile.open(archive) as files:
            wanted = [m for m in files if m.name.split("/", 1)[1].startswith(("tests/", "pyproject.toml"))]
            files.extractall(work, members=wanted, filter="data")
        Path(work, folder.name).rename(folder)
    return folder


def run(*arguments: str, selection: str = SELECTION, expected: int = EXPECTED) -> None:
    """Run the selected tests; raise unless all pass, none is skipped and there are as many as expected."""
    folder = fetch()
    report = folder / "report.xml"
    report.unlink(missing_ok=True)
    path = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TIMEOUT": "600"}
    command = [sys.executable, "-m", "pytest", "-p", "only_foveal", "tests/test_models.py", "-v", "-rs"]
    command += ["-k", selection, f"--junitxml={report}", *arguments]
    code = subprocess.run(command, cwd=folder, env=environment, check=False).returncode
    if code:
        raise SystemExit(f"timm's test-suite fails over foveal's models (pytest exits with {code}).")
    counts = ElementTree.parse(report).getroot().find("testsuite").attrib
    passed = int(counts["tests"]) - int(counts["skipped"])
    if int(counts["skipped"]) or passed != expected:
        raise SystemExit(f"Expected {expected} of timm's tests to run, got {passed} and {counts['skipped']} skipped.")


if __name__ == "__main__":
    run(*sys.argv[1:])
