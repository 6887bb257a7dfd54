"""Models on their way to production: torch.export, AOTInductor, ONNX and int8, against the model they came from."""

import copy

import pytest
import torch
from torch import nn
from torch.export import Dim

from foveal.models import transnext
from tests.helpers import assert_near, randomised

ANY_BATCH = {0: Dim.DYNAMIC}
ANY_SIZE = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}


def small(**kwargs) -> nn.Module:
    """Two stages, aggregated attention and global attention, with every parameter in play."""
    args = {"pretrain_size": 64, "img_size": 64, "num_classes": 4, **kwargs}
    return randomised(transnext((12, 24), (1, 1), (1, 2), (4, 4), (4, None), **args), std=0.2).eval()


class Maps(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images):
        return self.model.forward_intermediates(images, intermediates_only=True)


def export(net: nn.Module, dynamic: dict[int, object]) -> torch.export.ExportedProgram:
    with torch.no_grad():
        return torch.export.export(net, (torch.randn(2, 3, 72, 50),), dynamic_shapes=(dynamic,))


def assert_equals_the_model(run, net, *shapes):
    for batch, height, width in shapes:
        x = torch.randn(batch, 3, height, width)
        with torch.no_grad():
            actual, expected = run(x), net(x)
        if isinstance(expected, torch.Tensor):
            actual, expected = [actual], [expected]
        for a, e in zip(actual, expected, strict=True):
            assert_near(a, e, tol=1e-5)


def test_any_batch(tmp_path):
    """Saved and loaded, with PyTorch's own operators alone: it runs where foveal is not installed."""
    net = small()
    torch.export.save(export(net, ANY_BATCH), tmp_path / "net.pt2")
    program = torch.export.load(tmp_path / "net.pt2")
    assert not [node for node in program.graph.nodes if "foveal" in str(node.target)]
    assert_equals_the_model(program.module(), net, (2, 72, 50), (1, 72, 50), (5, 72, 50))


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"pool_grid": (7, 5)}, {"bias_resampling": "interpolate"}],
    ids=["normal mode", "linear mode", "interpolated"],
)
def test_any_size(kwargs):
    """Sizes that divide and sizes that do not, the declared one of the interpolated bias among them."""
    net = small(**kwargs)
    program = export(net, ANY_SIZE)
    assert not [node for node in program.graph.nodes if "foveal" in str(node.target)]
    assert_equals_the_model(program.module(), net, (2, 72, 50), (1, 64, 64), (3, 101, 160))


@pytest.mark.slow
@pytest.mark.parametrize("wrap", [lambda net: net, Maps], ids=["logits", "maps"])
def test_onnx_at_any_size(wrap, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    net = wrap(small())
    exported = torch.onnx.export(export(net, ANY_SIZE), dynamo=True, input_names=["images"], verbose=False)
    exported.save(tmp_path / "net.onnx")
    assert exported.model.opset_imports[""] >= 20
    assert set(exported.model.opset_imports) <= {"", "pkg.onnxscript.torch_lib", "pkg.onnxscript.torch_lib.common"}
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])

    def run(x):
        out = [torch.from_numpy(y) for y in session.run(None, {"images": x.numpy()})]
        return out if isinstance(net, Maps) else out[0]

    assert_equals_the_model(run, net, (2, 72, 50), (1, 64, 64), (3, 101, 160))


@pytest.mark.slow
def test_aot_inductor(tmp_path):
    net = small()
    path = str(tmp_path / "net.pt2")
    torch._inductor.aoti_compile_and_package(export(net, ANY_BATCH), package_path=path)
    assert_equals_the_model(torch._inductor.aoti_load_package(path), net, (2, 72, 50), (1, 72, 50), (5, 72, 50))


def torchs_own(net: nn.Module) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(net, {nn.Linear}, dtype=torch.qint8)


def torchaos(net: nn.Module) -> nn.Module:
    torchao = pytest.importorskip("torchao")
    quantised = copy.deepcopy(net)
    torchao.quantization.quantize_(quantised, torchao.quantization.Int8DynamicActivationInt8WeightConfig())
    return quantised


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("quantise", [torchs_own, torchaos])
def test_int8_linear_layers(quantise):
    """Dynamic quantisation of every Linear, those of the position bias among them."""
    net = small()
    quantised = quantise(net)
    assert not [m for m in quantised.modules() if type(m) is nn.Linear and type(m.weight) is nn.Parameter]
    x = torch.randn(4, 3, 64, 80)
    with torch.no_grad():
        actual, expected = quantised(x), net(x)
    assert not torch.equal(actual, expected)
    assert_near(actual, expected, tol=0.1)
