"""The Python of the README and of docs/ runs as it is printed: a page's blocks in order, in one namespace.

A block without a language behind it is what it prints. A block that needs what a test has not says so after its
language, as in ```python needs-gpu, and is only compiled. Weights of the hub stay random.
"""

import re
import sys
import types
from pathlib import Path
from unittest import mock

import pytest
import timm

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```python(.*)\n((?:.*\n)*?)```\n(?:\n```\n((?:.*\n)*?)```\n)?", re.MULTILINE)
PAGES = [path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if "template" not in path.name]
create_model = timm.create_model


def without_hub(name, pretrained=False, **arguments):
    return create_model(name, pretrained=pretrained and name.startswith("local-dir:"), **arguments)


def blocks(page):
    """What a block needs, its code at the lines that it has on the page, and what it prints where the page says."""
    text = page.read_text(encoding="utf-8")
    for block in BLOCK.finditer(text):
        lines = text.count("\n", 0, block.start(2))
        yield block[1].strip(), compile("\n" * lines + block[2], page, "exec"), block[3]


@pytest.mark.parametrize(
    "page", [page for page in PAGES if BLOCK.search(page.read_text(encoding="utf-8"))], ids=lambda p: p.name
)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType(f"page_{page.stem}")  # what timm registers is looked up in its module
    monkeypatch.setitem(sys.modules, module.__name__, module)
    with mock.patch("timm.create_model", without_hub):
        for needs, code, printed in blocks(page):
            assert needs in ("", "needs-hub", "needs-data", "needs-gpu")
            if needs:
                continue
            capsys.readouterr()
            exec(code, vars(module))
            assert printed in (None, capsys.readouterr().out)
