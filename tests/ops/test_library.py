"""The compiled library's way from sources to a loaded file, with a stand-in compiler that takes no time."""

import fcntl
import multiprocessing
import os
import subprocess
import sys
import warnings

import pytest
import torch

from foveal import ops
from foveal.ops.compiled import build, library, recipes, toolchain
from tests.ops.helpers import needs_compiler

pytestmark = pytest.mark.skipif(not toolchain.SUPPORTED, reason="no compiled library on this platform")

COMPILER = """#!/bin/sh
case "$*" in
  --version) echo stand-in 1.0; exit 0;;
esac
echo "$*" >> {log}
{work}
while [ "$1" != -o ]; do shift; done
echo made > "$2"
"""


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """Install a stand-in compiler and an empty cache; returns a function that lists its calls."""
    log = tmp_path / "calls"

    def install(work="true"):
        script = tmp_path / "compiler"
        script.write_text(COMPILER.format(log=log, work=work))
        script.chmod(0o755)
        monkeypatch.setenv("CXX", str(script))
        return lambda: log.read_text().splitlines() if log.exists() else []

    monkeypatch.setenv("FOVEAL_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(library, "_reasons", {})
    return install


@pytest.fixture
def loaded(monkeypatch):
    """Record what would be loaded instead of loading it."""
    paths = []
    monkeypatch.setattr(torch.ops, "load_library", paths.append)
    return paths


def gate():
    return ops.depthwise_gate(torch.randn(1, 2, 2, 4), torch.randn(2, 1, 3, 3))


def test_first_use_builds_and_the_cache_serves_the_second(compiler, loaded, capfd):
    calls = compiler()
    assert library.why_not("cpu") is None
    assert "foveal: building the cpu kernels" in capfd.readouterr().err
    count = len(calls())
    assert count > len(list(recipes.SOURCES.rglob("*.cpp")))  # kernels once per instruction set, and a link
    library._reasons.clear()
    assert library.why_not("cpu") is None
    assert capfd.readouterr().err == ""
    assert len(calls()) == count
    assert loaded[0] == loaded[1]
    assert loaded[0].exists()


def test_an_import_builds_nothing(compiler):
    calls = compiler()
    subprocess.run([sys.executable, "-c", "import foveal.ops"], check=True)
    assert calls() == []


def _build(_):
    return str(build.build(library.target("cpu")))


def test_processes_at_once_build_once(compiler):
    calls = compiler("sleep 0.2")
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        paths = pool.map(_build, range(3), chunksize=1)
    assert len(set(paths)) == 1
    assert len(calls()) == len(set(calls()))


def test_lock_file_left_behind_does_no_harm_and_a_held_one_ends_in_time(compiler, loaded, monkeypatch):
    compiler()
    lock = build.cache_directory() / library.target("cpu").key / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    monkeypatch.setenv("FOVEAL_BUILD_TIMEOUT", "0.2")
    with open(lock) as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.warns(UserWarning, match=r"another process has held .*lock"):
            gate()
    library._reasons.clear()
    monkeypatch.setenv("FOVEAL_BUILD_TIMEOUT", "60")
    assert library.why_not("cpu") is None


def test_failure_is_explained_once_remembered_and_tried_again_on_request(compiler, loaded, capfd):
    calls = compiler("echo no such thing >&2; exit 1")
    with pytest.warns(UserWarning, match="the cpu kernels do not compile"):
        gate()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gate()
    count = len(calls())
    library._reasons.clear()  # as in another process
    with pytest.warns(UserWarning, match="an earlier build failed"):
        gate()
    assert len(calls()) == count
    assert "no such thing" in library.describe("cpu")
    compiler()
    build.build(library.target("cpu"), retry=True)
    assert library.describe("cpu").startswith("built")


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [("CXX", "/nowhere/c++", r"no C\+\+ compiler"), ("PATH", "/nowhere", "ninja was not found")],
)
def test_missing_tools_leave_the_reference(compiler, monkeypatch, variable, value, reason):
    compiler()
    monkeypatch.setenv(variable, value)
    find_spec = toolchain.importlib.util.find_spec
    monkeypatch.setattr(
        toolchain.importlib.util, "find_spec", lambda name: None if name == "ninja" else find_spec(name)
    )
    with pytest.warns(UserWarning, match=reason):
        assert gate().shape == (1, 2, 2, 2)
    assert "none:" in library.describe("cpu")


def test_cache_that_cannot_be_written_moves_to_a_temporary_directory(compiler, loaded, tmp_path, monkeypatch):
    compiler()
    (tmp_path / "file").touch()
    monkeypatch.setenv("FOVEAL_CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(build.tempfile, "tempdir", str(tmp_path))
    assert library.why_not("cpu") is None
    assert loaded[0].is_relative_to(tmp_path / f"foveal-{os.getuid()}")
    (tmp_path / f"foveal-{os.getuid()}").chmod(0o777)
    library._reasons.clear()
    with pytest.warns(UserWarning, match="this user alone"):
        library.why_not("cpu")


def test_no_build_starts_while_a_graph_is_traced(compiler):
    calls = compiler()
    torch._dynamo.reset()
    torch.compile(gate, fullgraph=True, backend="eager")()
    assert calls() == []


@needs_compiler
def test_backend_by_hand(monkeypatch):
    with ops.backend("compiled"):
        gate()
        with pytest.raises(RuntimeError, match=r"depthwise_gate cannot run compiled:\n- torch.float16 is not served"):
            ops.depthwise_gate(torch.randn(1, 2, 2, 4).half(), torch.randn(2, 1, 3, 3))
        with pytest.raises(RuntimeError, match=r"(?s)a torch.func transform is active"):
            torch.func.vmap(lambda x: ops.depthwise_gate(x, torch.ones(2, 1, 3, 3)))(torch.randn(2, 1, 2, 2, 4))
        with pytest.raises(RuntimeError, match="no compiled kernels for meta tensors"):
            ops.depthwise_gate(torch.randn(1, 2, 2, 4, device="meta"), torch.randn(2, 1, 3, 3, device="meta"))
    monkeypatch.setattr(library, "_reasons", {"cpu": "of a reason"})
    gate()
    with ops.backend("compiled"), pytest.raises(RuntimeError, match="of a reason"):
        gate()
    with pytest.raises(ValueError, match="backend must be one of"), ops.backend("fast"):
        pass


@pytest.mark.parametrize("name", ["auto", "compiled", "reference", "fast"])
def test_backend_from_the_environment(name):
    code = "import foveal.ops; print(foveal.ops.current_backend())"
    environment = {**os.environ, "FOVEAL_BACKEND": name}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    if name == "fast":
        assert "FOVEAL_BACKEND must be one of" in result.stderr
    else:
        assert result.stdout.strip() == name


@needs_compiler
def test_transforms_exports_and_fake_tensors_take_the_reference():
    x, weight = torch.randn(2, 3, 3, 4), torch.randn(2, 1, 3, 3)
    jacobian = torch.func.jacrev(lambda x: ops.depthwise_gate(x, weight))(x[:1])
    assert jacobian.shape == (1, 3, 3, 2, 1, 3, 3, 4)

    class Gate(torch.nn.Module):
        def forward(self, x):
            return ops.depthwise_gate(x, weight)

    program = torch.export.export(Gate(), (x,))
    assert "foveal" not in program.graph_module.code
    with torch._subclasses.FakeTensorMode() as mode:
        assert ops.depthwise_gate(mode.from_tensor(x), mode.from_tensor(weight)).shape == (2, 3, 3, 2)


class _Gates(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return ops.depthwise_gate(torch.ones(8, 20, 20, 64), torch.ones(32, 1, 3, 3))


@needs_compiler
@pytest.mark.timeout(60, func_only=True)
def test_works_in_forked_workers_after_use_in_the_parent():
    expected = _Gates()[0]
    for batch in torch.utils.data.DataLoader(_Gates(), num_workers=2, batch_size=2, multiprocessing_context="fork"):
        assert batch[0].equal(expected)


@needs_compiler
@pytest.mark.parametrize("instruction_set", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_agrees(instruction_set):
    """The narrower kernels run on any CPU; a wider one than the CPU has is never chosen."""
    code = (
        "import torch; from tests.ops import test_gate, test_pool\n"
        "from tests.ops.helpers import assert_as_accurate\n"
        "for dtype in (torch.float32, torch.bfloat16, torch.float64):\n"
        "    for shape in test_gate.SHAPES[:6]:\n"
        "        assert_as_accurate(test_gate.gate(), test_gate.inputs(shape, dtype))\n"
        "    for shape, grid in test_pool.CASES[:6]:\n"
        "        assert_as_accurate(test_pool.pool(grid), [test_pool.tokens(shape, dtype)])\n"
    )
    environment = {**os.environ, "FOVEAL_CPU_ISA": instruction_set}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
