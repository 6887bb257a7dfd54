"""From the CUDA sources to a loaded library, with stand-ins for the compilers and for the GPUs."""

import shutil

import pytest
import torch

from foveal.__main__ import report
from foveal.ops.compiled import library, recipes, toolchain
from foveal.ops.compiled.toolchain import Architecture, BuildError

pytestmark = pytest.mark.skipif(not toolchain.SUPPORTED, reason="no compiled library on this platform")

STAND_IN = """#!/bin/sh
case "$*" in
  --version) echo "stand-in, release {release}, V1"; exit 0;;
esac
echo "$*" >> {log}
while [ "$1" != -o ]; do shift; done
echo made > "$2"
"""


class Machine:
    """A machine with these tools and GPUs; ``calls`` lists what the compilers were asked, ``loaded`` the libraries."""

    def __init__(self, path, patch):
        self.path, self.patch, self.loaded = path, patch, []
        patch.setenv("FOVEAL_CACHE_DIR", str(path / "cache"))
        patch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
        patch.setattr(library, "_reasons", {})
        patch.setattr(torch.ops, "load_library", self.loaded.append)
        patch.setattr(torch.version, "hip", None)
        self.install(cuda="13.0", torch_cuda="13.0")
        self.plug_in((9, 0))

    def install(self, *, cuda, torch_cuda):
        for variable, release in (("CXX", "1"), ("CUDACXX", cuda)):
            script = self.path / variable
            script.write_text(STAND_IN.format(log=self.path / "calls", release=release))
            script.chmod(0o755)
            self.patch.setenv(variable, str(script))
        for module in (toolchain, recipes):
            self.patch.setattr(module, "torch_cuda_version", lambda: torch_cuda)

    def plug_in(self, *gpus):
        self.patch.setattr(torch.cuda, "device_count", lambda: len(gpus))
        self.patch.setattr(torch.cuda, "get_device_capability", lambda index: gpus[int(str(index).split(":")[-1])])

    def calls(self):
        log = self.path / "calls"
        return log.read_text().splitlines() if log.exists() else []


@pytest.fixture
def machine(tmp_path, monkeypatch):
    return Machine(tmp_path, monkeypatch)


def test_first_use_builds_for_the_gpus_that_are_there(machine, capfd):
    machine.plug_in((9, 0), (8, 6))
    assert library.why_not("cuda:0") is None
    assert "foveal: building the cuda kernels" in capfd.readouterr().err
    compiled = [call for call in machine.calls() if call.endswith(".o")]
    assert len(compiled) > 0
    for call in compiled:
        assert "-gencode=arch=compute_86,code=sm_86 -gencode=arch=compute_90a,code=sm_90a" in call
    assert machine.loaded[0].name.startswith("foveal_cuda13_86_90a-")
    count = len(machine.calls())
    assert library.why_not("cuda:1") is None
    assert len(machine.calls()) == count


def test_ahead_of_time_for_listed_architectures_without_a_gpu(machine):
    machine.plug_in()
    machine.patch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0a 12.0+PTX")
    target = library.target("cuda")
    assert "code=[sm_120,compute_120]" in target.rules
    assert target.name.startswith("foveal_cuda13_80_90a_120ptx-")
    assert library.describe("cuda").startswith("not built yet")


@pytest.mark.parametrize(
    ("arch", "served", "unserved"),
    [
        ("8.0", [(8, 0), (8, 9)], [(7, 5), (9, 0)]),
        ("8.6", [(8, 6)], [(8, 0)]),
        ("9.0a", [(9, 0)], [(10, 0), (8, 0)]),
        ("10.0+PTX", [(10, 0), (10, 3), (12, 0)], [(9, 0)]),
    ],
)
def test_which_gpus_an_architecture_serves(arch, served, unserved):
    architecture = Architecture.parse(arch)
    assert Architecture.named(str(architecture)) == architecture
    assert all(architecture.serves(gpu) for gpu in served)
    assert not any(architecture.serves(gpu) for gpu in unserved)


@pytest.mark.parametrize("listed", ["7.5", "Ampere", "8.0;nine"])
def test_wrong_lists_of_architectures(machine, listed):
    machine.patch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    with pytest.raises(BuildError, match="TORCH_CUDA_ARCH_LIST"):
        library.target("cuda")


def test_reasons_against_the_kernels(machine, tmp_path):
    def reason(device="cuda:0"):
        library._reasons.clear()
        with pytest.warns(UserWarning, match="runs on plain PyTorch on cuda"):
            return library.why_not(device)

    machine.install(cuda="12.8", torch_cuda="13.0")
    assert "CUDA 12.8, and PyTorch of CUDA 13.0" in reason()
    assert "the major versions must agree" in library.describe("cuda")
    machine.install(cuda="13.1", torch_cuda="13.0")
    machine.plug_in((7, 5))
    assert "the kernels need compute capability 8.0 or later, these GPUs have 7.5" in reason()
    machine.plug_in((9, 0), (7, 5))
    assert reason("cuda:1") == "the kernels need compute capability 8.0 or later, cuda:1 has 7.5"
    machine.patch.setenv("TORCH_CUDA_ARCH_LIST", "10.0")
    assert "holds no code for the compute capability of cuda:0, 9.0" in reason()
    machine.patch.delenv("TORCH_CUDA_ARCH_LIST")
    machine.patch.setattr(toolchain.shutil, "which", lambda name: None if "nvcc" in name or "CUDACXX" in name else name)
    assert "nvcc was not found" in reason()
    machine.plug_in()
    assert "no GPU is visible" in library.describe("cuda")
    machine.patch.setattr(torch.version, "hip", "6.0")
    assert library.describe("cuda") == "none: there are no compiled kernels for ROCm"
    assert machine.loaded == []


def test_the_report_says_what_to_do(machine, monkeypatch, capsys):
    def kernels():
        report()
        return next(line for line in capsys.readouterr().out.splitlines() if line.startswith("cuda kernels"))

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "stand-in")
    assert "not built yet: an op's first use or `python -m foveal build` does it" in kernels()
    machine.install(cuda="12.8", torch_cuda="13.0")
    assert "install CUDA 13's toolkit and name its nvcc in CUDACXX" in kernels()
    machine.install(cuda="13.0", torch_cuda="13.0")
    machine.plug_in((7, 5))
    assert "these GPUs have 7.5; they run on plain PyTorch" in kernels()
    machine.plug_in()
    assert "no GPU is visible; TORCH_CUDA_ARCH_LIST=8.0;9.0a (for example) builds for GPUs elsewhere" in kernels()
    machine.plug_in((9, 0))
    monkeypatch.setattr(toolchain.shutil, "which", lambda name: None if "nvcc" in name or "CUDACXX" in name else name)
    assert "nvcc was not found on the path: install the CUDA toolkit, or name it in CUDACXX" in kernels()


def test_a_library_in_the_package_is_found_where_it_serves_the_gpus(machine, tmp_path):
    machine.plug_in()
    machine.patch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    name = library.target("cuda").name
    (tmp_path / name).touch()
    for gpu, version, found in [((8, 6), "13.3", True), ((9, 0), "13.0", False), ((8, 0), "12.8", False)]:
        machine.install(cuda=version, torch_cuda=version)
        assert bool(recipes.cuda_libraries(tmp_path, [gpu])) == found


def test_the_libraries_do_not_depend_on_each_others_sources(machine, tmp_path):
    sources = shutil.copytree(recipes.SOURCES, tmp_path / "csrc")
    machine.patch.setattr(recipes, "SOURCES", sources)

    def names():
        return library.target("cpu").name, library.target("cuda").name

    cpu, cuda = names()
    (sources / "cuda" / "gate.cu").write_text("// changed")
    assert names()[0] == cpu
    assert names()[1] != cuda
    cpu, cuda = names()
    (sources / "cpu" / "gate_kernel.cpp").write_text("// changed")
    assert names()[0] != cpu
    assert names()[1] == cuda
