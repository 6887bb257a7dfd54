"""Models on their way to production: torch.export and int8, against the model they came from."""

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


def export(net: nn.Module, dynamic: dict[int, object]) -> torch.export.ExportedProgram:
    with torch.no_grad():
        return torch.export.export(net, (torch.randn(2, 3, 72, 50),), dynamic_shapes=(dynamic,))


def assert_equals_the_model(run, net, *shapes):
    for batch, height, width in shapes:
        x = torch.randn(batch, 3, height, width)
        with torch.no_grad():
            actual, expected = run(x), net(x)
        assert_near(actual, expected, tol=1e-5)


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
