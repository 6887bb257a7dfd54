"""``python -m foveal build`` on a terminal shows how far it is; the package is found wherever Python starts."""

import io
import subprocess
import sys
import time

import pytest

from foveal import __main__ as main
from foveal.ops.compiled import build
from foveal.ops.compiled.recipes import Target

TARGET = Target(
    "cpu", "library.so", "key", "ninja", "rule cc\nbuild a.o: cc a\nbuild b.o: cc b\nbuild library.so: cc\n"
)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_build_counts_its_files(tmp_path, monkeypatch):
    def half_a_build(target, retry):
        (tmp_path / "key/objects").mkdir(parents=True)
        (tmp_path / "key/objects/a.o").touch()
        for _ in range(1000):
            if "1 of 3 files" in terminal.getvalue():
                break
            time.sleep(0.01)
        return tmp_path / target.name

    monkeypatch.setattr(build, "cache_directory", lambda: tmp_path)
    monkeypatch.setattr(build, "build", half_a_build)
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    assert main.build_counting_files(TARGET) == tmp_path / "library.so"
    assert "1 of 3 files" in terminal.getvalue()


def test_a_build_that_fails_says_why(tmp_path, monkeypatch):
    def failing_build(target, retry):
        raise build.BuildError("no compiler")

    monkeypatch.setattr(build, "cache_directory", lambda: tmp_path)
    monkeypatch.setattr(build, "build", failing_build)
    with pytest.raises(build.BuildError, match="no compiler"):
        main.build_counting_files(TARGET)


def test_a_folder_of_the_same_name_does_not_hide_the_package(tmp_path):
    """As above a clone, where Python may take the folder for a namespace package."""
    (tmp_path / "foveal" / "docs").mkdir(parents=True)
    code = "import foveal, timm; print(foveal.swap.__name__, timm.is_model('transnext_tiny'))"
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout == "swap True\n"
