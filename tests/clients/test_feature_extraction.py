"""Maps taken out of a backbone by hooks and graphs: torchvision's and timm's extractors, Grad-CAM."""

import pytest
import timm
import torch
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.feature_extraction import create_feature_extractor

from foveal.models import transnext


@pytest.fixture
def net():
    return transnext((12, 24), (1, 1), (1, 2), (4, 4), (4, None), pretrain_size=32, num_classes=4).eval()


@pytest.fixture
def maps(net):
    """Images and the maps of all stages, channels first."""
    x = torch.randn(2, 3, 64, 40)
    return x, net.forward_intermediates(x, intermediates_only=True)


def channels_first(x):
    return x.permute(0, 3, 1, 2)


def test_torchvisions_feature_extractor(net, maps):
    x, expected = maps
    extractor = create_feature_extractor(net, {"stages.0": "fine", "stages.1": "coarse", "head": "logits"})
    out = extractor(x)
    assert channels_first(out["fine"]).equal(expected[0])
    assert channels_first(out["coarse"]).equal(expected[1])
    assert out["logits"].equal(net(x))
    other = torch.randn(1, 3, 37, 53)  # the graph is not tied to a size
    assert channels_first(extractor(other)["coarse"]).equal(net.forward_intermediates(other)[0])


def test_torchvisions_feature_extractor_inside_a_block(net, maps):
    x, _ = maps
    taken = []
    net.stages[1].blocks[0].mixer.register_forward_hook(lambda module, args, out: taken.append(out))
    net(x)
    out = create_feature_extractor(net, {"stages.1.blocks.0.mixer": "mixed"})(x)
    assert out["mixed"].equal(taken[0])


def test_torchvisions_intermediate_layer_getter(net, maps):
    x, expected = maps
    getter = IntermediateLayerGetter(net.stages, {"0": "fine", "1": "coarse"})
    out = getter(x.permute(0, 2, 3, 1))
    assert channels_first(out["coarse"]).equal(expected[1])


@pytest.mark.parametrize("kind", ["hook", "fx"])
def test_timms_extractors_say_that_channels_are_last(kind):
    x, models = torch.randn(1, 3, 64, 96), []
    for kwargs in ({"feature_cls": kind}, {}):
        torch.manual_seed(1)
        models.append(timm.create_model("transnext_pico", features_only=True, **kwargs).eval())
    assert [model.output_fmt for model in models] == ["NHWC", "NCHW"]
    for ours, expected in zip(models[0](x), models[1](x), strict=True):
        assert channels_first(ours).equal(expected)


def test_hooks_of_a_stage_see_its_map_in_inference_too(net, maps):
    x, expected = maps
    seen = []
    net.stages[0].register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        net(x)
    torch.testing.assert_close(channels_first(seen[0]), expected[0], rtol=1e-5, atol=1e-5)


def test_grad_cam(net, maps):
    """The recipe of docs/clients.md, by the package's own arithmetic."""
    grad_cam = pytest.importorskip("pytorch_grad_cam")
    from pytorch_grad_cam.utils import image, model_targets

    x, _ = maps
    with grad_cam.GradCAM(net, target_layers=[net.stages[-1]], reshape_transform=channels_first) as cam:
        heat = cam(x, targets=[model_targets.ClassifierOutputTarget(1)] * 2)
    _, features = net.forward_intermediates(x, indices=[1])
    feature = features[0].detach().requires_grad_()
    (gradient,) = torch.autograd.grad(net.forward_head(feature)[:, 1].sum(), feature)
    expected = (gradient.mean((2, 3), keepdim=True) * feature).sum(1).relu().detach().numpy()
    for _ in range(2):  # a layer, and then the layers together, are scaled to the image's size and to one
        expected = image.scale_cam_image(expected, (40, 64))
    assert abs(heat - expected).max() < 1e-4


@pytest.mark.filterwarnings("ignore")
def test_counters_of_operations_give_a_number():
    """What docs/clients.md says of them; torch's own counter sees every product."""
    from foveal.analysis import count_flops

    net = timm.create_model("transnext_pico").eval()
    x = torch.randn(1, 3, 224, 224)
    exact = count_flops(net, x) / 2
    fvcore = pytest.importorskip("fvcore.nn")
    assert 0.95 < fvcore.FlopCountAnalysis(net, x).unsupported_ops_warnings(False).total() / exact < 1.15
    thop = pytest.importorskip("thop")
    assert 0.6 < thop.profile(net, (x,), verbose=False)[0] / exact < 1
