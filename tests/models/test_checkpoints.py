"""Official checkpoints: their key layout, and their way through timm into a model."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from foveal.blocks import AggregatedAttention, ConvGLU, LengthScaledCosineAttention
from foveal.models.checkpoints import checkpoint_filter_fn, from_official, load_file
from tests.helpers import randomised
from tests.models.test_transnext import PARAMETERS, small

BUFFERS = ("relative_pos_index", "relative_coords_table", "seq_length_scale", "padding_mask")


def official_attention(mixer) -> dict[str, torch.Tensor]:
    """A mixer's weights in the layout of the published code, written out name by name."""
    state, heads = mixer.state_dict(), mixer.num_heads
    official = {
        "temperature": state["temperature"].view(heads, 1, 1),
        "query_embedding": state["query_embedding"].view(heads, 1, -1),
        "proj.weight": state["proj.weight"],
        "proj.bias": state["proj.bias"],
        "cpb_fc1.weight": state["log_cpb.fc1.weight"],
        "cpb_fc1.bias": state["log_cpb.fc1.bias"],
        "cpb_fc2.weight": state["log_cpb.fc2.weight"],
        "cpb_fc2.bias": state["log_cpb.fc2.bias"],
    }
    if isinstance(mixer, LengthScaledCosineAttention):
        return {**official, "qkv.weight": state["qkv.weight"], "qkv.bias": state["qkv.bias"]}
    dim = mixer.dim
    return {
        **official,
        "q.weight": state["qkv.weight"][:dim],
        "q.bias": state["qkv.bias"][:dim],
        "kv.weight": state["qkv.weight"][dim:],
        "kv.bias": state["qkv.bias"][dim:],
        "relative_pos_bias_local": state["window_bias"],
        "learnable_tokens": state["positional_tokens"],
        "learnable_bias": state["positional_bias"].view(heads, 1, -1),
        "sr.weight": state["pool.proj.weight"].view(dim, dim, 1, 1),
        "sr.bias": state["pool.proj.bias"],
        "norm.weight": state["pool.norm.weight"],
        "norm.bias": state["pool.norm.bias"],
    }


def official_mlp(mlp) -> dict[str, torch.Tensor]:
    return {key.replace("dwconv.", "dwconv.dwconv."): value for key, value in mlp.state_dict().items()}


def official(model) -> dict[str, torch.Tensor]:
    """A whole model's weights in the layout of the published code."""
    state = {f"head.{name}": value for name, value in model.head.fc.state_dict().items()}

    def add(prefix: str, weights: dict[str, torch.Tensor]) -> None:
        state.update({f"{prefix}.{name}": value for name, value in weights.items()})

    for s, stage in enumerate(model.stages, start=1):
        add(f"patch_embed{s}", stage.downsample.state_dict())
        add(f"norm{s}", stage.norm.state_dict())
        for j, block in enumerate(stage.blocks):
            add(f"block{s}.{j}.norm1", block.norm1.state_dict())
            add(f"block{s}.{j}.norm2", block.norm2.state_dict())
            add(f"block{s}.{j}.attn", official_attention(block.mixer))
            add(f"block{s}.{j}.mlp", official_mlp(block.mlp))
    return state


def buffers(prefix: str) -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": torch.ones(3) for name in BUFFERS}


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


@pytest.fixture
def model():
    return randomised(small()).eval()


def test_classifier(model):
    assert_same(from_official(official(model)), model.state_dict())


def test_wrapped_in_a_dict(model):
    assert_same(from_official({"model": official(model), "epoch": 3}), model.state_dict())


def test_buffers_of_the_published_code_are_dropped(model):
    state = {**official(model), **buffers("block1.0.attn."), **buffers("")}
    assert_same(from_official(state), model.state_dict())


def test_detector_keeps_what_stands_before(model):
    state = {f"backbone.{key}": value for key, value in official(model).items()}
    assert_same(from_official(state), {f"backbone.{key}": value for key, value in model.state_dict().items()})


@pytest.mark.parametrize("layer", [AggregatedAttention(8, 2), LengthScaledCosineAttention(8, 2)])
@pytest.mark.parametrize("prefix", ["", "attn.", "encoder.3.attn."])
def test_one_attention_module(layer, prefix):
    state = {f"{prefix}{key}": value for key, value in official_attention(layer).items()}
    assert_same(from_official(state), {f"{prefix}{key}": value for key, value in layer.state_dict().items()})


@pytest.mark.parametrize("prefix", ["", "mlp."])
def test_one_mlp_module(prefix):
    layer = ConvGLU(8)
    state = {f"{prefix}{key}": value for key, value in official_mlp(layer).items()}
    assert_same(from_official(state), {f"{prefix}{key}": value for key, value in layer.state_dict().items()})


def test_gradients_as_well_as_weights(model):
    gradients = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
    holder = small()
    holder.load_state_dict(gradients)
    assert_same(from_official(official(holder)), gradients)


@pytest.mark.parametrize(
    "key",
    ["blocks.0.attn.q.weight", "block1.0.attn.rpe", "layer.weight", "block1.0.attn.norm3.weight", "mask", "fc3.bias"],
)
def test_unknown_key_raises(model, key):
    with pytest.raises(ValueError, match=key):
        from_official({**official(model), key: torch.zeros(1)})


@pytest.mark.parametrize("half", ["q.weight", "q.bias", "kv.weight", "kv.bias"])
def test_missing_half_of_a_projection_raises(model, half):
    state = official(model)
    del state[f"block1.0.attn.{half}"]
    with pytest.raises(ValueError, match=rf"without 'block1.0.attn.{half}'"):
        from_official(state)


def test_filter_takes_official_and_own_weights(model):
    own = model.state_dict()
    for state in (
        official(model),
        own,
        {"model": official(model)},
        {"state_dict": own},
        {f"module.{k}": v for k, v in own.items()},
        {f"module.{k}": v for k, v in official(model).items()},
        {**{f"backbone.{k}": v for k, v in official(model).items()}, "neck.lateral.weight": torch.zeros(1)},
    ):
        assert_same(checkpoint_filter_fn(state, model), own)


@pytest.mark.parametrize("name", PARAMETERS)
def test_official_file_through_timm(name, tmp_path):
    """Saved in the official layout, loaded by timm as from the hub: the same weights, hence the same logits."""
    model = randomised(timm.create_model(name), std=0.05).eval()
    path = tmp_path / "official.pth"
    torch.save({"model": {**official(model), **buffers("block2.0.attn.")}}, path)
    loaded = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(path)}).eval()
    x = torch.randn(1, 3, 48, 64)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
    assert_same(loaded.state_dict(), model.state_dict())


@pytest.fixture(scope="module")
def official_micro(tmp_path_factory):
    """The micro variant and its official file, as the hub would hold it."""
    torch.manual_seed(0)
    model = randomised(timm.create_model("transnext_micro"), std=0.05).eval()
    path = tmp_path_factory.mktemp("hub") / "transnext_micro_224_1k.pth"
    torch.save(official(model), path)
    return model, {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path)}}


def test_pretrained(official_micro):
    model, pretrained = official_micro
    assert_same(timm.create_model("transnext_micro", **pretrained).state_dict(), model.state_dict())


def test_pretrained_for_other_images_and_classes(official_micro):
    model, pretrained = official_micro
    loaded = timm.create_model("transnext_micro", in_chans=1, num_classes=5, **pretrained).eval()
    stem, expected = loaded.stages[0].downsample.proj.weight, model.stages[0].downsample.proj.weight
    torch.testing.assert_close(stem, expected.sum(1, keepdim=True))
    assert loaded(torch.randn(1, 1, 32, 32)).shape == (1, 5)
    assert_same(loaded.stages[1:].state_dict(), model.stages[1:].state_dict())


def test_pretrained_features(official_micro):
    model, pretrained = official_micro
    features = timm.create_model("transnext_micro", features_only=True, **pretrained).eval()
    x = torch.randn(1, 3, 64, 48)
    with torch.no_grad():
        for actual, expected in zip(features(x), model.forward_intermediates(x, intermediates_only=True), strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("kwargs", [{"pool_grid": 7}, {"bias_resampling": "interpolate"}, {"img_size": 288}], ids=str)
def test_pretrained_in_every_mode(official_micro, kwargs):
    model, pretrained = official_micro
    assert_same(timm.create_model("transnext_micro", **pretrained, **kwargs).state_dict(), model.state_dict())


def test_foreign_file_is_refused(tmp_path):
    path = tmp_path / "resnet.pth"
    torch.save(timm.create_model("resnet10t").state_dict(), path)
    with pytest.raises(ValueError, match="neither of the official TransNeXt layout"):
        timm.create_model("transnext_micro", pretrained=True, pretrained_cfg_overlay={"file": str(path)})


def test_load_file(model, tmp_path):
    state = model.state_dict()
    torch.save({"model": state}, tmp_path / "weights.pth")
    save_file(state, tmp_path / "weights.safetensors")
    for name in ("weights.pth", "weights.safetensors"):
        assert_same(load_file(tmp_path / name), state)
        assert_same(load_file(str(tmp_path / name)), state)


def test_load_file_reads_tensors_alone(tmp_path):
    torch.save({"model": nn.Linear(1, 1)}, tmp_path / "code.pth")
    with pytest.raises(Exception, match=r"weights_only|Weights only"):
        load_file(tmp_path / "code.pth")


def test_safetensors_through_timm(model, tmp_path):
    micro = timm.create_model("transnext_micro")
    save_file(micro.state_dict(), tmp_path / "own.safetensors")
    loaded = timm.create_model("transnext_micro", checkpoint_path=str(tmp_path / "own.safetensors"))
    assert_same(loaded.state_dict(), micro.state_dict())


@pytest.mark.parametrize(
    "part", ["", "stages.0", "stages.1", "stages.0.blocks.0", "stages.0.blocks.0.mixer", "stages.0.blocks.0.mlp"]
)
def test_what_is_foveals_own_stays_as_it_is(part, model):
    state = model.get_submodule(part).state_dict()
    assert from_official(state).keys() == state.keys()


def test_a_part_of_foveals_own_weights(model):
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("stages.0")}
    assert checkpoint_filter_fn(state, model).keys() == state.keys()


def test_weights_of_parts_that_were_wrapped(model):
    state = model.state_dict()
    wrapped = {
        name.replace("mlp.", "mlp._orig_mod.").replace("blocks.0.", "blocks.0._checkpoint_wrapped_module."): value
        for name, value in state.items()
    }
    assert wrapped.keys() != state.keys()
    assert checkpoint_filter_fn(wrapped, model).keys() == state.keys()


def test_the_backbone_that_fits_is_taken(model):
    state = {f"student.{name}": value for name, value in model.state_dict().items()}
    state["teacher.block1.0.attn.sr.weight"] = torch.zeros(16, 16, 8, 8)  # PVTv2's
    assert checkpoint_filter_fn(state, model).keys() == model.state_dict().keys()
    twice = {f"{prefix}.{name}": value for prefix in ("a", "b") for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"'a\.', 'b\.'"):
        checkpoint_filter_fn(twice, model)


def test_a_dict_under_an_unknown_key_is_named(model):
    with pytest.raises(ValueError, match="network"):
        checkpoint_filter_fn({"network": model.state_dict(), "epoch": 3}, model)
