"""The gallery of hosts: the committed page is what its lines give, and the README shows the same lines."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINE = re.compile(r"`(foveal\.swap\(model, [^`]*\))`")


def load():
    spec = importlib.util.spec_from_file_location("docs_hosts", ROOT / "docs" / "hosts.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_page_is_what_its_lines_give():
    assert load().page() == (ROOT / "docs" / "hosts.md").read_text(encoding="utf-8"), "run python docs/hosts.py"


def test_one_line_of_each_table():
    """Every day: the page's figures of two hosts."""
    page, hosts = (ROOT / "docs" / "hosts.md").read_text(encoding="utf-8"), load()
    for entry in (hosts.CONVGLU[0], hosts.ATTENTION[5]):
        assert hosts.row(*entry) in page, "run python docs/hosts.py"


def test_the_readme_shows_lines_of_the_page():
    page = (ROOT / "docs" / "hosts.md").read_text(encoding="utf-8")
    lines = LINE.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(lines) >= 8
    assert set(lines) <= set(LINE.findall(page))
