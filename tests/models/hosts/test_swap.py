"""swap: which modules it takes, what it keeps, what it refuses, and what a swapped model goes through."""

import copy
from collections import OrderedDict
from functools import partial

import pytest
import timm
import torch
from timm.models.convnext import ConvNeXtBlock
from timm.optim import param_groups_weight_decay
from timm.utils import ModelEmaV3
from torch import nn

import foveal
from foveal.blocks import GLU, AggregatedAttention, ConvFFN, ConvGLU
from foveal.blocks.layouts import ChannelsFirst, Tokens
from foveal.models import Replacements
from tests.helpers import assert_near
from tests.models.hosts.tiny import HOSTS

VIT = {"embed_dim": 24, "depth": 3, "num_heads": 2, "img_size": 32, "patch_size": 8, "num_classes": 5}
MLPS = "blocks.*.mlp"


def vit(**kwargs):
    return timm.create_model("vit_tiny_patch16_224", **VIT, **kwargs)


def convolutions():
    """A network that foveal does not know."""
    layers = [("first", nn.Conv2d(3, 8, 3, padding=1)), ("down", nn.Conv2d(8, 8, 2, 2)), ("last", nn.Conv2d(8, 12, 1))]
    return nn.Sequential(OrderedDict([("body", nn.Sequential(OrderedDict(layers))), ("act", nn.ReLU())]))


# What it takes.


def test_lists_what_it_replaced():
    model = vit()
    mlps = [block.mlp for block in model.blocks]
    replaced = foveal.swap(model, {MLPS: ConvGLU})
    assert isinstance(replaced, Replacements)
    assert [r.name for r in replaced] == [f"blocks.{i}.mlp" for i in range(3)]
    for r, old in zip(replaced, mlps, strict=True):
        new = model.get_submodule(r.name)
        assert isinstance(new.block, ConvGLU)
        assert (r.old, r.new) == ("Mlp", "ConvGLU in Tokens")
        for module, count in ((old, r.parameters_before), (new, r.parameters_after)):
            assert sum(p.numel() for p in module.parameters()) == count
    assert str(replaced) == "\n".join((
        "blocks.0.mlp  Mlp -> ConvGLU in Tokens  4,728 -> 5,400",
        "blocks.1.mlp  Mlp -> ConvGLU in Tokens  4,728 -> 5,400",
        "blocks.2.mlp  Mlp -> ConvGLU in Tokens  4,728 -> 5,400",
        "3 modules     parameters                14,184 -> 16,200",
    ))  # fmt: skip


@pytest.mark.parametrize(
    ("pattern", "taken"),
    [("blocks.*.mlp", "012"), ("blocks.1.mlp", "1"), ("blocks.[02].mlp", "02"), ("block?.*.m*p", "012")],
)
def test_patterns(pattern, taken):
    assert [r.name for r in foveal.swap(vit(), {pattern: GLU})] == [f"blocks.{i}.mlp" for i in taken]


def test_a_star_is_one_part_of_a_name():
    with pytest.raises(ValueError, match=r"'\*\.mlp' matches no module of VisionTransformer"):
        foveal.swap(vit(), {"*.mlp": ConvGLU})


def test_several_blocks_at_once():
    model = HOSTS["Swin"].build()
    mixers = {f"layers.{i}.blocks.*.attn": partial(AggregatedAttention, pool_ratio=r) for i, r in enumerate((4, 2))}
    replaced = foveal.swap(model, {**mixers, "layers.*.blocks.1.mlp": ConvFFN})
    assert [r.name for r in replaced] == [
        "layers.0.blocks.0.attn",
        "layers.0.blocks.1.attn",
        "layers.0.blocks.1.mlp",
        "layers.1.blocks.0.attn",
    ]
    assert [model.get_submodule(r.name).pool_ratio for r in replaced if "attn" in r.name] == [4, 4, 2]


def test_inside_other_models():
    """A ViT as a part of a model, and behind timm's feature extraction."""
    outer = nn.ModuleDict({"encoder": vit()})
    foveal.swap(outer, {"encoder.blocks.*.mlp": ConvGLU})
    assert outer["encoder"](torch.randn(1, 3, 32, 32)).shape == (1, 5)
    features = vit(features_only=True, out_indices=(0, 2))
    before = features(x := torch.randn(1, 3, 32, 32))
    foveal.swap(features, {"model.blocks.1.mlp": ConvGLU})
    after = features(x)
    assert torch.equal(after[0], before[0])
    assert not torch.equal(after[1], before[1])


# What it keeps.


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dd", [{"dtype": torch.bfloat16}, {"device": "meta"}], ids=str)
def test_dtype_device_and_mode(dd, training):
    model = vit(**dd).train(training)
    foveal.swap(model, {MLPS: ConvGLU})
    for module in model.blocks[0].mlp.modules():
        assert module.training is training
    expected = {"dtype": torch.float32, "device": "cpu", **dd}
    for tensor in model.blocks[0].mlp.parameters():
        assert (tensor.dtype, tensor.device.type) == (expected["dtype"], expected["device"])
    assert model(torch.randn(1, 3, 32, 32).to(**dd)).shape == (1, 5)


def test_rates_heads_and_width():
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, patch_size=4, embed_dim=16, depths=(1, 1), num_heads=(4, 8),
        window_size=4, proj_drop_rate=0.1, attn_drop_rate=0.2,
    )  # fmt: skip
    foveal.swap(model, {"layers.*.blocks.*.attn": AggregatedAttention, "layers.*.blocks.*.mlp": ConvGLU})
    block = model.layers[1].blocks[0]
    assert (block.attn.num_heads, block.attn.attn_drop, block.attn.proj_drop.p) == (8, 0.2, 0.1)
    assert (block.mlp.block.hidden_dim, block.mlp.block.drop.p) == (int(32 * 4 * 2 / 3), 0.1)
    foveal.swap(model, {"layers.*.blocks.*.mlp": GLU, "layers.*.blocks.*.attn": AggregatedAttention})
    assert (block.mlp.block.hidden_dim, block.mlp.block.drop.p) == (int(32 * 4 * 2 / 3), 0.1), "swapped twice"
    assert (block.attn.num_heads, block.attn.attn_drop, block.attn.proj_drop.p) == (8, 0.2, 0.1)


def test_a_gated_mlp_keeps_its_width():
    for name, width in (("eva02_tiny_patch14_224", 64), ("vit_small_patch16_dinov3", 64)):
        model = timm.create_model(name, **(VIT | {"num_heads": 3}))
        foveal.swap(model, {MLPS: ConvGLU})
        assert model.blocks[0].mlp.block.hidden_dim == width, name


def test_arguments_of_a_partial_stand():
    model = vit()
    foveal.swap(model, {MLPS: partial(ConvGLU, hidden_dim=10, act_layer=nn.SiLU, drop=0.3)})
    block = model.blocks[0].mlp.block
    assert (block.hidden_dim, type(block.act), block.drop.p) == (10, nn.SiLU, 0.3)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224"])
def test_initialised_again(name):
    """The hosts reach into their MLPs by name to scale their weights."""
    model = timm.create_model(name, **VIT, **({"fix_init": True} if name.startswith("vit") else {}))
    foveal.swap(model, {MLPS: ConvGLU})
    with torch.no_grad():
        for p in model.blocks.parameters():
            p.fill_(float("nan"))
    model.init_weights()
    assert all(p.isfinite().all() for p in model.blocks.parameters() if p.dim() > 1)
    stds = [block.mlp.fc2.weight.detach().std() for block in model.blocks]
    assert_near(stds[0] / stds[2], torch.tensor(3.0).sqrt(), tol=0.2)


def test_tells_what_should_not_decay():
    model = HOSTS["Swin"].build()
    replaced = foveal.swap(model, {"layers.0.*.*.attn": AggregatedAttention, "layers.*.blocks.*.mlp": ConvGLU})
    names = {"temperature", "query_embedding", "window_bias"}
    names |= {f"log_cpb.fc{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}
    assert replaced.no_weight_decay == {f"layers.0.blocks.{i}.attn.{name}" for i in (0, 1) for name in names}
    exempt = model.no_weight_decay() | replaced.no_weight_decay
    groups = param_groups_weight_decay(model, 0.1, no_weight_decay_list=exempt)
    decayed = {id(p) for p in groups[1]["params"]}
    assert not any(id(model.get_parameter(name)) in decayed for name in replaced.no_weight_decay)
    assert id(model.layers[0].blocks[0].attn.positional_tokens) in decayed


# What it refuses.


def meta(name):
    return lambda: timm.create_model(name, device="meta")


def convnext(**kwargs):
    return nn.ModuleDict({"block": ConvNeXtBlock(8, **kwargs)})


def own_windows():
    model = HOSTS["Swin"].build()
    block = model.layers[0].blocks[0]
    block.__class__ = type("OwnBlock", (type(block),), {})
    return model


TOKENS, MIXERS = "stages.*.*.transformer.*.mlp", "stages.*.blocks.*.conv_dw"
ATTENTION = partial(AggregatedAttention, num_heads=2)
REFUSED = {
    "Hiera": (meta("hiera_tiny_224"), {MLPS: ConvGLU}, r"blocks\.0\.mlp: Hiera .* mask units"),
    "NaFlex": (meta("naflexvit_base_patch16_gap"), {MLPS: ConvGLU}, r"blocks\.0\.mlp: NaFlexVit .* different grids"),
    "patch dropout": (
        partial(vit, patch_drop_rate=0.2),
        {MLPS: ConvGLU},
        r"blocks\.0\.mlp: patch dropout leaves holes",
    ),
    "PiT": (meta("pit_ti_224"), {"transformers.*.blocks.*.mlp": ConvGLU}, "tokens in Transformer is unknown"),
    "MobileViT": (meta("mobilevit_s"), {TOKENS: ConvGLU}, "the grid of the tokens .* is unknown"),
    "prefix tokens": (vit, {"blocks.*.attn": ATTENTION}, r"blocks\.0\.attn: num_prefix_tokens must be 0 for Aggreg"),
    "rotary embedding": (HOSTS["EVA-02"].build, {"blocks.*.attn": ATTENTION}, "rotary embeddings"),
    "strided mixer": (partial(convnext, stride=2), {"block.conv_dw": ATTENTION}, "changes the size"),
    "widening mixer": (partial(convnext, out_chs=16), {"block.conv_dw": ATTENTION}, "changes the width"),
    "unknown windows": (own_windows, {"layers.*.blocks.*.attn": ATTENTION}, "how OwnBlock cuts its map into windows"),
    "unknown network": (
        convolutions,
        {"body.first": ConvGLU},
        r"not know what 'first' of .*Sequential sees; .*adapter=",
    ),
    "unknown part": (vit, {"blocks.*.norm1": ConvGLU}, r"does not know what 'norm1'"),
    "no match": (vit, {"block.*.mlp": ConvGLU}, r"'block\.\*\.mlp' matches no .*close to it: 'blocks\.\*\.mlp'"),
    "nothing like it": (vit, {"xyz": ConvGLU}, "'xyz' matches no module of VisionTransformer$"),
    "two patterns": (vit, {MLPS: ConvGLU, "blocks.1.*": GLU}, r"'blocks\.1\.\*' both match blocks\.1\.mlp"),
    "inside another": (vit, {MLPS: ConvGLU, "blocks.1": GLU}, r"blocks\.1\.mlp lies in blocks\.1"),
    "no factory": (vit, {MLPS: ConvGLU(24)}, r"blocks\.0\.mlp: block: expected a factory"),
    "no module": (vit, {MLPS: lambda dim: None}, r"blocks\.0\.mlp: block: expected .* to return a torch\.nn\.Module"),
    "wrong argument": (vit, {MLPS: partial(ConvGLU, hidden_dim=0)}, r"blocks\.0\.mlp: block: hidden_dim must be"),
    "missing argument": (HOSTS["ConvNeXt"].build, {MIXERS: AggregatedAttention}, "num_heads"),
    "other width": (vit, {MLPS: lambda dim: ConvGLU(dim, out_dim=7)}, r"return \(B, H, W, 24\), but turned .* 7\)"),
    "no patterns": (vit, {}, "blocks must be a non-empty mapping"),
    "no mapping": (vit, [MLPS], "blocks must be a non-empty mapping"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_and_changes_nothing(case):
    build, blocks, reason = REFUSED[case]
    model = build()
    modules = list(model.named_modules())
    with pytest.raises((ValueError, TypeError), match=reason):
        foveal.swap(model, blocks)
    assert list(model.named_modules()) == modules


def test_a_late_refusal_leaves_no_trace():
    """The first pattern alone would have been served, with a hook on the patch embedding."""
    model = vit(dynamic_img_size=True)
    modules = list(model.named_modules())
    with pytest.raises(ValueError, match="'head'"):
        foveal.swap(model, {MLPS: ConvGLU, "head": ConvGLU})
    assert list(model.named_modules()) == modules
    assert not any(module._forward_hooks for module in model.modules())
    foveal.swap(model, {MLPS: ConvGLU})
    assert len(model.patch_embed._forward_hooks) == 1, "one grid for all"
    swin = HOSTS["Swin"].build()
    with pytest.raises(ValueError, match="'norm1'"):
        foveal.swap(swin, {"layers.*.blocks.*.attn": AggregatedAttention, "layers.*.blocks.*.norm1": ConvGLU})
    assert type(swin.layers[0].blocks[0]).__name__ == "SwinTransformerBlock"


def test_a_shared_module_is_refused():
    model = vit()
    model.blocks[1].mlp = model.blocks[0].mlp
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp is shared: blocks\.1\.mlp is the same module"):
        foveal.swap(model, {"blocks.0.mlp": ConvGLU})


def test_hooks_are_not_lost():
    model = vit()
    model.blocks[2].mlp.register_forward_hook(print)
    with pytest.raises(ValueError, match=r"blocks\.2\.mlp: the module has forward hooks"):
        foveal.swap(model, {MLPS: ConvGLU})


# Networks that it does not know.


def test_named_adapter():
    model = convolutions()
    blocks = {"body.last": ConvGLU, "body.first": partial(ConvGLU, hidden_dim=4)}
    replaced = foveal.swap(model, blocks, adapter=ChannelsFirst)
    assert [r.new for r in replaced] == ["ConvGLU in ChannelsFirst"] * 2
    x = torch.randn(2, 3, 10, 14)
    first = model.body.first.block(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    last = model.body.last.block(model.body.down(first).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    assert_near(model(x), last.relu())
    assert last.shape == (2, 12, 5, 7)
    with pytest.raises(ValueError, match=r"body\.down: the module changes the size of the map, from"):
        foveal.swap(model, {"body.down": ConvGLU}, adapter=ChannelsFirst)
    with pytest.raises(ValueError, match="neither a Linear nor a convolution"):
        foveal.swap(model, {"act": ConvGLU}, adapter=ChannelsFirst)


class C3(nn.Module):
    """Two ways through, joined by ``cv3``; the parts are registered after it and run before it."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        width = out_channels // 2
        self.cv3 = nn.Conv2d(2 * width, out_channels, 1)
        self.m = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1))
        self.cv1, self.cv2 = nn.Conv2d(in_channels, width, 1), nn.Conv2d(in_channels, width, 1)

    def forward(self, x):
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), dim=1))


class LateFirst(nn.Module):
    """An MLP that registers its layers in the opposite order; over maps that have channels last, or tokens."""

    def __init__(self, dim, hidden_dim, dims=4):
        super().__init__()
        self.dims = dims
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.fc1 = nn.Linear(dim, hidden_dim)

    def forward(self, x):
        assert x.dim() == self.dims
        return self.fc2(self.fc1(x).relu())


class Masked(nn.Module):
    """A module that no tensor alone can run."""

    def __init__(self, dim, out_dim):
        super().__init__()
        self.first, self.last = nn.Linear(dim, 7), nn.Linear(7, out_dim)

    def forward(self, x, mask):
        return self.last(self.first(x) * mask)


def test_widths_are_those_that_run():
    """Whatever the order in which the layers are registered."""
    model = nn.Sequential(OrderedDict(c3=C3(48, 64), head=nn.Conv2d(64, 5, 1)))
    foveal.swap(model, {"c3": ConvGLU}, adapter=ChannelsFirst)
    assert (model.c3.block.fc1.in_features, model.c3.block.fc2.out_features) == (48, 64)
    assert model(torch.randn(1, 48, 6, 9)).shape == (1, 5, 6, 9)
    with pytest.raises(ValueError, match=r"c3: the block must return \(B, H, W, 64\)"):
        foveal.swap(
            nn.ModuleDict({"c3": C3(48, 64)}), {"c3": lambda dim: ConvGLU(dim, out_dim=32)}, adapter=ChannelsFirst
        )


@pytest.mark.parametrize("dims", [3, 4])
def test_the_hidden_width_does_not_follow_the_order(dims):
    model = nn.ModuleDict({"mlp": LateFirst(24, 96, dims)})
    foveal.swap(model, {"mlp": ConvGLU}, adapter=partial(Tokens, grid=(3, 4)))
    block = model["mlp"].block
    assert (block.fc1.in_features, block.hidden_dim, block.fc2.out_features) == (24, 64, 24)


def test_channels_are_not_taken_for_columns():
    """A Linear takes maps of channels first, too, where their rows are as long as it is wide."""
    for width in (56, 112):
        model = nn.Sequential(nn.Linear(width, 8))
        foveal.swap(model, {"0": ConvGLU}, adapter=lambda block: block)
        assert (model[0].fc1.in_features, model[0].fc2.out_features) == (width, 8)


def test_the_size_is_that_which_runs():
    """Down and up again keeps it, a convolution without padding does not."""
    layers = nn.Conv2d(8, 8, 2, 2), nn.Upsample(scale_factor=2), nn.Conv2d(8, 8, 3)
    model = nn.ModuleDict({"keeps": nn.Sequential(*layers[:2]), "cuts": layers[2]})
    foveal.swap(model, {"keeps": ConvGLU}, adapter=ChannelsFirst)
    with pytest.raises(ValueError, match=r"cuts: the module changes the size of the map, from \(1, 8, 56, 112\) to"):
        foveal.swap(model, {"cuts": ConvGLU}, adapter=ChannelsFirst)


def test_a_module_that_does_not_run_alone():
    """One that takes more than a map keeps its width by its layers, or is refused; so is one that fails."""
    model = nn.ModuleDict({"keeps": Masked(16, 16), "widens": Masked(16, 24), "fails": nn.Sequential(nn.Linear(8, 8))})
    model["fails"].append(nn.Linear(9, 9))
    foveal.swap(model, {"keeps": ConvGLU}, adapter=partial(Tokens, grid=2))
    assert model["keeps"].block.dim == 16
    with pytest.raises(ValueError, match=r"widens: the widths of Masked are unknown: .*'mask'.* 16 .* 24"):
        foveal.swap(model, {"widens": ConvGLU}, adapter=partial(Tokens, grid=2))
    with pytest.raises(ValueError, match=r"fails: the widths of Sequential are unknown: .*maps nor tokens of 8 or 9"):
        foveal.swap(model, {"fails": ConvGLU}, adapter=partial(Tokens, grid=2))


def test_swapped_again():
    model = nn.ModuleDict({"mlp": LateFirst(24, 96, 3)})
    for block, grid in ((ConvGLU, 3), (GLU, 4)):
        foveal.swap(model, {"mlp": block}, adapter=partial(Tokens, grid=grid))
    assert model["mlp"](torch.randn(1, 16, 24)).shape == (1, 16, 24)


def test_named_adapter_of_tokens():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    foveal.swap(
        layer, {"linear1": partial(ConvGLU, hidden_dim=8)}, adapter=partial(Tokens, grid=(3, 4), num_prefix_tokens=1)
    )
    assert layer(torch.randn(2, 13, 16)).shape == (2, 13, 16)


# What a swapped model goes through.


def test_exponential_moving_average():
    model = vit(dynamic_img_size=True)
    foveal.swap(model, {MLPS: ConvGLU})
    ema = ModelEmaV3(model, decay=0.5)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    ema.update(model)
    assert_near(ema.module.blocks[0].mlp.block.dwconv.weight, model.blocks[0].mlp.block.dwconv.weight - 0.5)
    x = torch.randn(1, 3, 16, 48)
    twin = copy.deepcopy(model)
    twin.load_state_dict(ema.module.state_dict())
    ema.module(x), model(torch.randn(1, 3, 32, 32))
    assert_near(ema.module(x), twin(x))


def test_distributed_data_parallel(tmp_path):
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        model = vit(dynamic_img_size=True)
        foveal.swap(model, {MLPS: ConvGLU})
        twin = copy.deepcopy(model)
        x = torch.randn(2, 3, 16, 48)
        for network in (torch.nn.parallel.DistributedDataParallel(model), twin):
            network(x).square().sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
