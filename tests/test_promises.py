"""What pyproject.toml promises is what continuous integration tries."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
WORKFLOW = (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")


def test_the_oldest_versions_that_are_tried_are_those_that_are_promised():
    promised = re.findall(r'"([\w-]+)>=([\d.]+)"', re.search(r"^dependencies = .*", PROJECT, re.MULTILINE)[0])
    tried = re.findall(r"^([\w-]+)==([\d.]+?)(?:\.\*)?$", (ROOT / ".ci/oldest.txt").read_text(), re.MULTILINE)
    assert [name for name, _ in tried] == [name for name, _ in promised]
    for (name, version), (_, oldest) in zip(tried, promised, strict=True):
        assert version.removesuffix(".0") == oldest, name


def test_the_oldest_python_is_tried():
    pythons = re.findall(r'"(3\.\d+)"', re.search(r"python: .*", WORKFLOW)[0])
    assert pythons[0] == re.search(r'requires-python = ">=(.*)"', PROJECT)[1]
