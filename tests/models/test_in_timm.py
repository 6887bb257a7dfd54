"""A backbone of one's own as a model of timm's."""

from functools import partial

import pytest
import timm
import torch
from timm.data import resolve_model_data_config
from timm.models import generate_default_cfgs, register_model

from foveal.blocks import AggregatedAttention, ConvGLU
from foveal.models import Backbone, Stage, timm_model

STAGES = [
    Stage(dim=dim, depth=1, mixer=partial(AggregatedAttention, num_heads=2, pool_ratio=2), mlp=ConvGLU)
    for dim in (12, 24, 48)
]


@register_model
def own_net(pretrained=False, **kwargs):
    return timm_model(Backbone, "own_net", pretrained, stages=STAGES, **kwargs)


default_cfgs = generate_default_cfgs({"own_published_net.small": {"input_size": (1, 32, 32), "num_classes": 7}})


@register_model
def own_published_net(pretrained=False, **kwargs):
    return timm_model(Backbone, "own_published_net", pretrained, stages=STAGES, **kwargs)


def test_by_its_name(caplog):
    model = timm.create_model("own_net", num_classes=5, in_chans=1, drop_path_rate=0.1)
    assert isinstance(model, Backbone)
    assert model(torch.randn(2, 1, 32, 48)).shape == (2, 5)
    assert not caplog.records
    assert (model.default_cfg["architecture"], model.default_cfg["classifier"]) == ("own_net", "head.fc")
    assert resolve_model_data_config(model)["input_size"] == (3, 224, 224)
    model.get_submodule(model.default_cfg["first_conv"])


def test_what_its_module_says_of_it():
    model = timm.create_model("own_published_net.small")
    assert (model.in_chans, model.num_classes) == (1, 7)
    assert model.default_cfg["tag"] == "small"


@pytest.mark.parametrize(("indices", "channels"), [(None, [12, 24, 48]), ((0, 2), [12, 48]), (2, [24, 48])])
def test_features(indices, channels):
    chosen = {} if indices is None else {"out_indices": indices}
    features = timm.create_model("own_net", features_only=True, **chosen)
    assert features.feature_info.channels() == channels
    assert [x.shape[1] for x in features(torch.randn(1, 3, 32, 32))] == channels


def test_weights(tmp_path):
    """Of a file, for another number of classes and channels too."""
    model = timm.create_model("own_net")
    torch.save({"model": model.state_dict()}, tmp_path / "own.pth")
    overlay = {"file": str(tmp_path / "own.pth")}
    loaded = timm.create_model("own_net", pretrained=True, pretrained_cfg_overlay=overlay)
    assert all(map(torch.equal, loaded.state_dict().values(), model.state_dict().values()))
    gray = timm.create_model("own_net", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=2, in_chans=1)
    assert torch.equal(gray.stages[2].blocks[0].mlp.fc1.weight, model.stages[2].blocks[0].mlp.fc1.weight)
    with pytest.raises(RuntimeError, match="No pretrained weights"):
        timm.create_model("own_net", pretrained=True)


def test_an_unknown_argument_is_named():
    with pytest.raises(TypeError, match="no_such"):
        timm.create_model("own_net", no_such=1)


def test_as_an_encoder_of_segmentation_models():
    smp = pytest.importorskip("segmentation_models_pytorch")
    net = smp.Unet("tu-own_net", encoder_weights=None, encoder_depth=4, decoder_channels=(32, 16, 8, 4), classes=2)
    assert net.encoder.out_channels == [3, 0, 12, 24, 48]
    assert net(torch.randn(2, 3, 64, 64)).shape == (2, 2, 64, 64)
