"""The reference variants: sizes, arguments, initialisation, and their entries in timm."""

import copy
import math
import re

import pytest
import timm
import torch
from timm.layers import DropPath
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from foveal.blocks import AggregatedAttention, LengthScaledCosineAttention
from foveal.models import transnext
from tests.helpers import assert_near, randomised

PARAMETERS = {
    "transnext_pico": 2_242_832,
    "transnext_micro": 12_809_304,
    "transnext_tiny": 28_258_960,
    "transnext_small": 49_741_564,
    "transnext_base": 89_721_496,
    "transnext_micro_aaaa": 13_114_008,
}
SIZES = [(224, 224), (256, 256), (384, 384), (100, 150), (32, 32), (33, 65)]
QUICK = {
    "transnext_pico",
    "transnext_micro",
    "transnext_micro_aaaa",
}  # the others run at one size every day, at all with --slow
SWEEP = [
    pytest.param(name, size, marks=() if name in QUICK or size == (33, 65) else pytest.mark.slow, id=f"{name}-{size}")
    for name in PARAMETERS
    for size in SIZES
]


def small(**kwargs):
    """Four stages like TransNeXt's, small enough for every test."""
    args = {"num_classes": 10, "img_size": 64, "pretrain_size": 64, **kwargs}
    return transnext((12, 24, 48, 96), (1, 1, 2, 1), (1, 2, 4, 8), (4, 4, 4, 4), (8, 4, 2, None), **args)


@pytest.fixture(scope="module")
def variant():
    """The variants, made once."""
    models = {}

    def get(name):
        if name not in models:
            models.clear()
            torch.manual_seed(0)
            models[name] = timm.create_model(name)
        return models[name]

    return get


@pytest.mark.parametrize(("name", "count"), PARAMETERS.items())
def test_parameter_count(name, count):
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == count
    assert not list(model.buffers())


@pytest.mark.parametrize(("name", "size"), SWEEP)
def test_forward_and_backward(variant, name, size):
    model = variant(name).train()
    model.zero_grad()
    logits = model(torch.randn(1, 3, *size))
    assert logits.shape == (1, 1000)
    assert logits.isfinite().all()
    nn.functional.cross_entropy(logits, torch.tensor([7])).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"pool_grid": (7, 7)}, {"bias_resampling": "interpolate"}],
    ids=["normal mode", "linear mode", "interpolated"],
)
def test_one_size_after_another_equals_a_fresh_model(kwargs):
    model = randomised(small(**kwargs), std=0.1).eval()
    for size in [(64, 64), (33, 65), (100, 150), (64, 64), (1, 1), (33, 65), (32, 32), (64, 64)]:
        fresh = small(**kwargs).eval()
        fresh.load_state_dict(model.state_dict())
        x = torch.randn(1, 3, *size)
        with torch.no_grad():
            assert torch.equal(model(x), fresh(x))


def attention(model, kind=AggregatedAttention):
    return [module for module in model.modules() if isinstance(module, kind)]


def test_the_mixers_of_the_variants():
    for name in PARAMETERS:
        model = timm.create_model(name, device="meta")
        kinds = "".join(
            {AggregatedAttention: "A", LengthScaledCosineAttention: "M"}[type(stage.blocks[0].mixer)]
            for stage in model.stages
        )
        assert kinds == ("AAAA" if name.endswith("aaaa") else "AAAM")
        assert {m.dim // m.num_heads for m in attention(model)} == {24}
        for stage in model.stages:
            assert len({type(block.mixer) for block in stage.blocks}) == 1


@pytest.mark.parametrize(
    ("kwargs", "grids"),
    [({}, (56, 28, 14, 7)), ({"pretrain_size": 384}, (96, 48, 24, 12)), ({"pretrain_size": 20}, (5, 2, 1, 1))],
)
def test_pretrain_size(kwargs, grids):
    model = timm.create_model("transnext_tiny", device="meta", **kwargs)
    assert tuple(stage.blocks[0].mixer.pretrain_grid for stage in model.stages) == tuple((g, g) for g in grids)


def test_pretrain_size_changes_the_result_and_the_size_of_the_image_does_not_change_it():
    model = randomised(small(pretrain_size=64), std=0.1).eval()
    other = small(pretrain_size=96).eval()
    other.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 64, 64)
    assert not torch.allclose(model(x), other(x), atol=1e-4)
    resized = copy.deepcopy(model)
    resized.set_input_size(160)
    assert torch.equal(resized(x), model(x))


def test_linear_mode_fixes_the_pooled_grid():
    model = small(pool_grid=(7, 7))
    assert {m.key_grid((20, 30)) for m in attention(model)} == {(7, 7)}
    assert len(attention(model)) == 4
    default = {m.key_grid((16, 24)) for m in attention(small())}
    assert default == {(2, 3), (4, 6), (8, 12)}


def test_interpolation_equals_extrapolation_at_the_declared_size_only():
    interpolating = randomised(small(bias_resampling="interpolate"), std=0.2).eval()
    extrapolating = small().eval()
    extrapolating.load_state_dict(interpolating.state_dict())
    x, wide = torch.randn(1, 3, 64, 64), torch.randn(1, 3, 64, 128)
    with torch.no_grad():
        assert_near(interpolating(x), extrapolating(x))
        assert not torch.allclose(interpolating(wide), extrapolating(wide), atol=1e-3)
        interpolating.set_input_size((64, 128))
        assert_near(interpolating(wide), extrapolating(wide))
        assert not torch.allclose(interpolating(x), extrapolating(x), atol=1e-3)


def test_window_size():
    assert {m.window_bias.shape[1] for m in attention(small(window_size=5))} == {25}


@pytest.mark.parametrize("size", [(96, 160), (33, 65)])
def test_features_only(size):
    model = timm.create_model("transnext_tiny", features_only=True).eval()
    assert model.feature_info.channels() == [72, 144, 288, 576]
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    with torch.no_grad():
        maps = model(torch.randn(1, 3, *size))
    for x, channels, reduction in zip(maps, model.feature_info.channels(), model.feature_info.reduction(), strict=True):
        assert x.shape == (1, channels, *(math.ceil(side / reduction) for side in size))
        assert x.isfinite().all()


def test_features_of_chosen_stages_equal_the_models():
    torch.manual_seed(1)
    model = timm.create_model("transnext_micro").eval()
    features = timm.create_model("transnext_micro", features_only=True, out_indices=(1, 3)).eval()
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("head")}
    features.model.load_state_dict(state)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model.forward_intermediates(x, indices=[1, 3], intermediates_only=True)
        for actual, wanted in zip(features(x), expected, strict=True):
            assert torch.equal(actual, wanted)


def test_arguments_of_timm():
    x = torch.randn(2, 3, 64, 64)
    headless = timm.create_model("transnext_micro", num_classes=0).eval()
    with torch.no_grad():
        assert headless(x).shape == (2, 384)
        assert_near(headless(x), headless.forward_features(x).mean((2, 3)))
        assert timm.create_model("transnext_micro", num_classes=0, global_pool="")(x).shape == (2, 384, 2, 2)
        assert timm.create_model("transnext_micro", in_chans=1, num_classes=5)(x[:, :1]).shape == (2, 5)


def test_parts_of_ones_own():
    model = small(norm_layer=nn.RMSNorm, act_layer=nn.SiLU)
    assert all(isinstance(stage.norm, nn.RMSNorm) for stage in model.stages)
    assert all(isinstance(block.mlp.act, nn.SiLU) for stage in model.stages for block in stage.blocks)
    assert all(isinstance(mixer.pool.act, nn.SiLU) for mixer in attention(model))
    assert model(torch.randn(1, 3, 64, 64)).isfinite().all()


def test_dropout_rates_reach_their_layers():
    model = small(drop_rate=0.1, proj_drop_rate=0.2, attn_drop_rate=0.3)
    assert model.head.drop.p == 0.1
    blocks = [block for stage in model.stages for block in stage.blocks]
    assert {block.mixer.proj_drop.p for block in blocks} == {0.2}
    assert {block.mlp.drop.p for block in blocks} == {0.2}
    assert {block.mixer.attn_drop for block in blocks} == {0.3}


@pytest.mark.parametrize(("name", "rate"), [("transnext_micro", 0.15), ("transnext_small", 0.45)])
def test_drop_path_rises_linearly_over_all_blocks(name, rate):
    model = timm.create_model(name, drop_path_rate=rate, device="meta")
    paths = [block.drop_path for stage in model.stages for block in stage.blocks]
    actual = [path.drop_prob if isinstance(path, DropPath) else 0.0 for path in paths]
    assert actual == pytest.approx([rate * i / (len(paths) - 1) for i in range(len(paths))])


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"not_an_argument": 1}, TypeError, "not_an_argument"),
        ({"window_size": 4}, ValueError, "stage 0, block 0, mixer: window_size"),
        ({"pool_grid": (7,)}, ValueError, "stage 0, block 0, mixer: pool_grid"),
        ({"bias_resampling": "bilinear"}, ValueError, "stage 0, block 0, mixer: bias_resampling"),
        ({"num_heads": (2, 4, 8)}, ValueError, "num_heads must have one value a stage"),
        ({"num_heads": (2, 4, 8, 7)}, ValueError, "stage 3, block 0, mixer: num_heads"),
        ({"pretrain_size": 0}, ValueError, "pretrain_size"),
        ({"img_size": (224, -1)}, ValueError, "img_size"),
        ({"drop_path_rate": 1.0}, ValueError, "drop_path_rate"),
        ({"drop_rate": -0.1}, ValueError, "drop_rate"),
        ({"attn_drop_rate": 2}, ValueError, "attn_drop_rate"),
        ({"proj_drop_rate": 2}, ValueError, "proj_drop_rate"),
    ],
    ids=str,
)
def test_wrong_argument_is_named(kwargs, error, message):
    with pytest.raises(error, match=message):
        timm.create_model("transnext_micro", device="meta", **kwargs)


# Initialisation and weight decay.


def test_initialisation():
    state = timm.create_model("transnext_micro").state_dict()
    linear = re.compile(r"(head\.fc|fc1|fc2|qkv|mixer\.proj)\.weight$|query_embedding$|positional_tokens$")
    for name, value in state.items():
        if name.endswith(("norm.weight", "norm1.weight", "norm2.weight")):
            std, mean = 0.0, 1.0
        elif name.endswith(("bias", "positional_bias")) and not name.endswith("window_bias"):
            std, mean = 0.0, 0.0
        elif name.endswith("temperature"):
            std, mean = 0.0, math.log(math.exp(1 / 0.24) - 1)
        elif name.endswith("window_bias"):
            std, mean = 0.0004, 0.0
        elif name.endswith("pool.proj.weight"):
            std, mean = math.sqrt(2 / len(value)), 0.0
        elif value.dim() == 4:  # convolutions; depthwise ones have one output a group
            std, mean = math.sqrt(2 / (value.shape[2] * value.shape[3] * (1 if "dwconv" in name else len(value)))), 0.0
        else:
            assert linear.search(name), name
            std, mean = 0.02, 0.0
        slack = 5 * std / math.sqrt(2 * value.numel()) + 1e-6
        assert abs(value.std(correction=0).item() - std) <= 1.5 * slack + 0.02 * std, name
        assert abs(value.mean().item() - mean) <= 1.5 * slack, name


def test_weights_drawn_after_the_meta_device():
    model = small(device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    model.init_weights()
    for (name, parameter), reference in zip(model.named_parameters(), small().parameters(), strict=True):
        actual, expected = (p.detach().std(correction=0).item() for p in (parameter, reference))
        assert math.isclose(actual, expected, rel_tol=0.6, abs_tol=1e-3), name
        assert parameter.isfinite().all(), name


def test_what_does_not_decay():
    model = timm.create_model("transnext_micro", device="meta")
    _, decaying = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    decaying = {id(p) for p in decaying["params"]}
    for name, parameter in model.named_parameters():
        exempt = name.endswith(("query_embedding", "window_bias", "temperature", "norm.weight", ".bias"))
        exempt = exempt or ".log_cpb." in name or re.search(r"norm[12]?\.", name)
        assert (id(parameter) in decaying) == (not exempt), name
    assert all(name in dict(model.named_parameters()) for name in model.no_weight_decay())


def test_layer_decay_follows_the_depth():
    model = timm.create_model("transnext_micro", device="meta")
    groups = param_groups_layer_decay(model, layer_decay=0.5, no_weight_decay_list=model.no_weight_decay())
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    along = [
        model.stages[0].downsample.proj.weight,
        model.stages[0].blocks[0].mixer.qkv.weight,
        model.stages[0].blocks[1].mixer.qkv.weight,
        model.stages[2].blocks[3].mlp.fc1.weight,
        model.stages[3].blocks[1].mlp.fc2.weight,
        model.head.fc.weight,
    ]
    scales = [scale[id(p)] for p in along]
    assert scales == sorted(set(scales))
    assert scales[-1] == 1


# Entries in timm.

_OFFICIAL = {
    "transnext_micro.in1k": ("transnext-micro-224-1k", "transnext_micro_224_1k.pth", 224),
    "transnext_tiny.in1k": ("transnext-tiny-224-1k", "transnext_tiny_224_1k.pth", 224),
    "transnext_small.in1k": ("transnext-small-224-1k", "transnext_small_224_1k.pth", 224),
    "transnext_base.in1k": ("transnext-base-224-1k", "transnext_base_224_1k.pth", 224),
    "transnext_small.in1k_384": ("transnext-small-384-1k-ft-1k", "transnext_small_384_1k_ft_1k.pth", 384),
    "transnext_base.in1k_384": ("transnext-base-384-1k-ft-1k", "transnext_base_384_1k_ft_1k.pth", 384),
    "transnext_micro_aaaa.in1k_256": ("transnext-micro-AAAA-256-1k", "transnext_micro_AAAA_256_1k.pth", 256),
}


def test_every_official_weight_has_an_entry():
    assert set(timm.list_models("transnext*")) == set(PARAMETERS)
    assert set(timm.list_pretrained("transnext*")) == set(_OFFICIAL)


@pytest.mark.parametrize(("name", "where"), _OFFICIAL.items())
def test_official_weights(name, where):
    repository, filename, size = where
    cfg = timm.get_pretrained_cfg(name)
    assert cfg.hf_hub_id == f"DaiShiResearch/{repository}"
    assert cfg.hf_hub_filename == filename
    assert cfg.license == "apache-2.0"
    assert cfg.paper_ids == "arXiv:2311.17132"

    model = timm.create_model(name, device="meta")
    assert model.stages[0].blocks[0].mixer.pretrain_grid == ((64, 64) if size == 256 else (56, 56))
    data = timm.data.resolve_data_config(model=model)
    assert data["input_size"] == (3, size, size)
    assert data["interpolation"] == "bicubic"
    assert data["mean"] == (0.485, 0.456, 0.406)
    assert data["std"] == (0.229, 0.224, 0.225)
    assert (data["crop_pct"], data["crop_mode"]) == ((1.0, "squash") if size >= 384 else (0.875, "center"))
    for path in (cfg.first_conv, cfg.classifier):
        assert isinstance(model.get_submodule(path), nn.Conv2d | nn.Linear)


def test_preprocessing_of_an_image():
    """Below 384 the short side becomes size / 0.875 and the centre is cut out; at 384 the image is squashed."""
    from PIL import Image

    image = Image.new("RGB", (500, 300))
    for name, resized in [("transnext_tiny", (426, 256)), ("transnext_small.in1k_384", (384, 384))]:
        config = timm.data.resolve_data_config(model=timm.create_model(name, device="meta"))
        transform = timm.data.create_transform(**config)
        assert transform.transforms[0](image).size == resized
        assert transform(image).shape == config["input_size"]
