"""torch.jit.trace at one size: every block and registered model, on the definitions, in a file that needs no foveal."""

import subprocess
import sys
import warnings

import pytest
import timm
import torch

import foveal
from foveal import blocks
from foveal.blocks.layouts import ChannelsFirst, Tokens
from tests.blocks.test_contract import MAPS
from tests.helpers import assert_near, randomised

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "error::torch.jit.TracerWarning")

MODELS = {*timm.list_models(module="transnext"), *timm.list_models(module="hybrids")}


@pytest.fixture(params=[True, False], ids=["grad", "no grad"], autouse=True)
def _grad(request):
    with torch.set_grad_enabled(request.param):
        yield


def traced(module, *inputs):
    """With the check of torch.jit.trace itself, which traces again and compares outputs and graphs.

    timm's models may warn of sizes that they look at; foveal may not.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"timm|torch", category=torch.jit.TracerWarning)
        return torch.jit.trace(module, inputs)


def operators(module):
    return {node.kind() for node in module.inlined_graph.nodes()}


@pytest.mark.parametrize("build", MAPS.values(), ids=MAPS)
def test_a_block(build):
    block = randomised(build()).eval()
    x = torch.randn(2, 6, 7, 8)
    found = traced(block, x)
    assert_near(found(x).detach(), block(x).detach())
    assert_near(found(2 * x).detach(), block(2 * x).detach())
    assert not any(name.startswith("foveal") for name in operators(found))


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (lambda: ChannelsFirst(blocks.ConvGLU(8)), (2, 8, 5, 6)),
        (lambda: Tokens(blocks.ConvGLU(8), grid=(5, 6), num_prefix_tokens=1), (2, 31, 8)),
    ],
)
def test_an_adapter(module, shape):
    module, x = randomised(module()).eval(), torch.randn(shape)
    assert_near(traced(module, x)(x).detach(), module(x).detach())


@pytest.mark.parametrize(
    "name", ["transnext_pico", *(pytest.param(n, marks=pytest.mark.slow) for n in sorted(MODELS - {"transnext_pico"}))]
)
def test_a_registered_model(name):
    model = timm.create_model(name).eval()
    size = 224 if "convglu" in name else 64
    x = torch.randn(2, 3, size, size)
    found = traced(model, x)
    assert_near(found(x).detach(), model(x).detach())
    other = torch.randn(3, 3, size, size)  # another number of images
    assert_near(found(other).detach(), model(other).detach())


def test_every_registered_model_is_named():
    assert {"transnext_pico", "transnext_tiny", "vit_tiny_patch16_convglu_224"} <= MODELS


def test_a_file_that_loads_without_foveal(tmp_path):
    model = timm.create_model("transnext_pico").eval()
    x = torch.randn(1, 3, 64, 96)
    traced(model, x).save(tmp_path / "net.pt")
    torch.save((x, model(x).detach()), tmp_path / "pair.pt")
    code = (
        "import sys, torch; net = torch.jit.load(sys.argv[1]); x, y = torch.load(sys.argv[2]);"
        "assert not any(name.partition('.')[0] in ('foveal', 'timm') for name in sys.modules);"
        "print((net(x) - y).abs().max().item() <= 1e-5 * y.abs().max().item())"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "net.pt"), str(tmp_path / "pair.pt")]
    assert subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout == "True\n"


def test_a_trace_leaves_nothing_behind():
    """What is kept from call to call is not kept in a trace, and a trace does not take up what was kept."""
    model = timm.create_model("transnext_pico").eval()
    x = torch.randn(1, 3, 64, 96)
    expected = model(x).detach()
    with torch.no_grad():
        model(x)
    first = traced(model, x)
    assert_near(model(x).detach(), expected)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    assert_near(first(x).detach(), model(x).detach())  # a trace shares the parameters


def test_both_backends_trace_alike():
    block, x = randomised(blocks.ConvGLU(8)).eval(), torch.randn(1, 5, 6, 8)
    with foveal.ops.backend("reference"):
        expected = operators(traced(block, x))
    assert operators(traced(block, x)) == expected


@pytest.mark.parametrize("module", [blocks.ConvGLU(8), torch.nn.Sequential(blocks.AggregatedAttention(8, 2))])
def test_scripting_is_refused_with_what_works(module):
    with pytest.raises(NotImplementedError, match=r"torch\.jit\.trace.*torch\.export"):
        torch.jit.script(module)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "build",
    [
        lambda: blocks.LengthScaledCosineAttention(8, 2),
        lambda: blocks.SpatialReductionAttention(8, 2, sr_ratio=2),
        lambda: blocks.AggregatedAttention(8, 2, pool_ratio=2),
        lambda: blocks.ConvGLU(8),
    ],
)
def test_the_older_onnx_exporter(build, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    block, x = randomised(build()).eval(), torch.randn(1, 6, 7, 8)
    torch.onnx.export(block, (x,), tmp_path / "block.onnx", dynamo=False, opset_version=18)
    session = onnxruntime.InferenceSession(tmp_path / "block.onnx")
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_near(torch.from_numpy(out), block(x).detach())


def test_a_model_of_timm_with_blocks_in_it():
    model = timm.create_model("pvt_v2_b0", num_classes=3).eval()
    foveal.swap(model, {"stages.*.blocks.*.mlp": blocks.ConvGLU})
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        assert_near(traced(model, x)(x), model(x))
