"""Stage declarations: what each slot takes, and what a wrong one says."""

from functools import partial

import pytest
import torch
from timm.layers import DropPath, LayerScale
from torch import nn

from foveal.blocks import AggregatedAttention, ConvGLU, LengthScaledCosineAttention, OverlapPatchEmbed
from foveal.models import Backbone, Stage
from tests.helpers import assert_near

AGGREGATED = partial(AggregatedAttention, num_heads=2)


def build(*slots, **kwargs):
    """A backbone of small stages; each dict replaces slots of one."""
    stages = [Stage(**{"dim": 8, "depth": 1, "mixer": AGGREGATED, "mlp": ConvGLU, **slot}) for slot in slots]
    return Backbone(stages, **{"num_classes": 3, **kwargs})


class Shift(nn.Module):
    """A mixer of one's own, without parameters."""

    def __init__(self, dim):
        super().__init__()
        self.dim = dim

    def forward(self, x):
        return x.roll((1, -1), dims=(1, 2))


def test_a_list_of_mixers():
    net = build({"depth": 4, "mixer": [AGGREGATED, Shift] * 2, "mlp": [ConvGLU] * 3 + [lambda dim: nn.Identity()]})
    blocks = net.stages[0].blocks
    assert [type(block.mixer) for block in blocks] == [AggregatedAttention, Shift] * 2
    assert isinstance(blocks[3].mlp, nn.Identity)
    assert net(torch.randn(1, 3, 32, 32)).shape == (1, 3)


def test_one_factory_makes_a_module_a_block():
    blocks = build({"depth": 3}).stages[0].blocks
    assert len({id(block.mixer) for block in blocks}) == len({id(block.norm1) for block in blocks}) == 3


def test_modules_of_ones_own_in_every_slot():
    net = build(
        {
            "mixer": Shift,
            "mlp": lambda dim: nn.Sequential(nn.Linear(dim, 3), nn.ReLU(), nn.Linear(3, dim)),
            "downsample": lambda in_chans, dim: Strided(in_chans, dim),
            "norm_layer": nn.RMSNorm,
        }
    )
    assert isinstance(net.stages[0].downsample, Strided)
    assert isinstance(net.stages[0].norm, nn.RMSNorm)
    assert isinstance(net.stages[0].blocks[0].norm2, nn.RMSNorm)
    assert net.feature_info[0]["reduction"] == 3
    assert net.forward_features(torch.randn(1, 3, 32, 20)).shape == (1, 8, 11, 7)


class Strided(nn.Module):
    """A downsampling of one's own: every third pixel, projected. It looks at the values, as a router would."""

    def __init__(self, in_chans, dim):
        super().__init__()
        self.proj = nn.Linear(in_chans, dim)

    def forward(self, x):
        if x.isnan().any():
            raise RuntimeError("not a number")
        return self.proj(x[:, ::3, ::3])


def test_replaced_downsampling_moves_grids_and_reductions():
    patches = partial(OverlapPatchEmbed, patch_size=3, stride=2)
    net = build({"downsample": patches}, {}, {"downsample": partial(patches, stride=1)}, pretrain_size=64)
    assert [info["reduction"] for info in net.feature_info] == [2, 4, 4]
    grids = [stage.blocks[0].mixer.pretrain_grid for stage in net.stages]
    assert grids == [(32, 32), (16, 16), (16, 16)]


def test_norm_layer_of_the_stage_goes_before_the_backbones():
    net = build({"norm_layer": nn.RMSNorm}, {}, norm_layer=partial(nn.LayerNorm, eps=0.5))
    assert isinstance(net.stages[0].norm, nn.RMSNorm)
    assert net.stages[1].norm.eps == net.stages[1].blocks[0].norm1.eps == 0.5


def test_layer_scale():
    net = build({"layer_scale": 1e-3}, {})
    block, x = net.stages[0].blocks[0], torch.randn(1, 4, 4, 8)
    assert isinstance(block.scale1, LayerScale)
    half = x + 1e-3 * block.mixer(block.norm1(x))
    assert_near(block(x), half + 1e-3 * block.mlp(block.norm2(half)))
    assert isinstance(net.stages[1].blocks[0].scale1, nn.Identity)


def test_drop_path_of_the_stage_goes_before_the_backbones():
    net = build({"depth": 2, "drop_path": [0.3, 0.0]}, {"depth": 2, "drop_path": 0.1}, {"depth": 2}, drop_path_rate=0.5)
    paths = [block.drop_path for stage in net.stages for block in stage.blocks]
    rates = [path.drop_prob if isinstance(path, DropPath) else 0.0 for path in paths]
    assert rates == pytest.approx([0.3, 0.0, 0.1, 0.1, 0.4, 0.5])


def test_a_stage_offers_what_the_signature_names():
    seen = {}

    def mixer(dim, *, device, dtype, attn_drop, proj_drop, pretrain_grid, bias_grid, other=7):
        seen["mixer"] = (dim, device, dtype, attn_drop, proj_drop, pretrain_grid, bias_grid, other)
        return Shift(dim)

    def mlp(dim, drop=0.0, **unnamed):
        seen["mlp"] = (dim, drop, unnamed)
        return nn.Identity()

    build(
        {"mixer": partial(mixer, attn_drop=0.9), "mlp": mlp},
        proj_drop_rate=0.1,
        attn_drop_rate=0.2,
        pretrain_size=64,
        img_size=(96, 32),
        dtype=torch.float64,
    )
    assert seen["mixer"] == (8, None, torch.float64, 0.9, 0.1, (16, 16), (24, 8), 7)
    assert seen["mlp"] == (8, 0.1, {})


def test_without_a_pretrain_size_there_is_no_grid_to_offer():
    assert build({}).stages[0].blocks[0].mixer.pretrain_grid is None


@pytest.mark.parametrize("positional", [False, True])
def test_what_a_partial_has_fixed_stays(positional):
    mixer = partial(AggregatedAttention, num_heads=2, proj_drop=0.5, pretrain_grid=(3, 4))
    mixer = partial(mixer, attn_drop=0.25) if positional else mixer
    made = build({"mixer": mixer}, proj_drop_rate=0.1, attn_drop_rate=0.2, pretrain_size=64).stages[0].blocks[0].mixer
    assert (made.proj_drop.p, made.pretrain_grid) == (0.5, (3, 4))
    assert made.attn_drop == (0.25 if positional else 0.2)


def test_a_module_that_takes_no_dtype_is_moved():
    net = build({"mixer": lambda dim: nn.Linear(dim, dim)}, dtype=torch.float64)
    assert {p.dtype for p in net.parameters()} == {torch.float64}
    net = build({"mixer": lambda dim: nn.Linear(dim, dim)}, device="meta")
    assert all(p.is_meta for p in net.parameters())


class Cautious(nn.Module):
    """A mixer that keeps something of its first forward, and running statistics."""

    def __init__(self, dim):
        super().__init__()
        self.norm = nn.BatchNorm2d(dim)
        self.first = None

    def forward(self, x):
        if self.first is None:
            self.first = x.mean()
        return self.norm(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Seeing(Cautious):
    """The same, and it looks at the values."""

    def forward(self, x):
        return super().forward(x) if x.sum() < 1e9 else x


@pytest.mark.parametrize("mixer", [Cautious, Seeing])
def test_the_check_at_construction_leaves_no_trace(mixer):
    net = build({"mixer": mixer, "downsample": partial(Traced, mixer)})
    for module in (net.stages[0].blocks[0].mixer, net.stages[0].downsample.inner):
        assert module.training
        assert module.first is None
        assert module.norm.num_batches_tracked == 0
        assert not module.norm.running_mean.any()
    net(torch.ones(2, 3, 32, 32))
    assert type(net.stages[0].blocks[0].mixer.first) is torch.Tensor


def test_the_check_at_construction_runs_in_eval_mode():
    """Batch normalisation refuses to train on a single cell."""
    assert build({"mixer": Cautious}, img_size=4)


class Traced(nn.Module):
    def __init__(self, inner, in_chans, dim):
        super().__init__()
        self.proj, self.inner = nn.Linear(in_chans, dim), inner(dim)

    def forward(self, x):
        return self.inner(self.proj(x[:, ::4, ::4]))


def test_the_check_at_construction_draws_no_random_numbers():
    patches = partial(OverlapPatchEmbed, patch_size=3, stride=2)
    torch.manual_seed(3)
    net = build({"mixer": Shift, "mlp": Shift, "downsample": patches}, {"mixer": Shift, "mlp": Shift})
    torch.manual_seed(3)
    first, second = patches(3, 8), patches(8, 8)
    assert torch.equal(net.stages[0].downsample.proj.weight, first.proj.weight)
    assert torch.equal(net.stages[1].downsample.proj.weight, second.proj.weight)


class Tuple(Shift):
    def forward(self, x):
        return x, x


class Refusing(Shift):
    def __init__(self, dim):
        super().__init__(dim)
        assert dim % 3 == 0, "dim should be divisible by 3"


WRONG = {
    "heads that do not divide": ({"dim": 9}, ValueError, ", block 0, mixer: num_heads must divide dim = 9, got 2"),
    "mixers too few": ({"depth": 3, "mixer": [AGGREGATED] * 2}, ValueError, ": mixer must be .* depth = 3, got 2"),
    "mlps too many": ({"mlp": [ConvGLU] * 2}, ValueError, ": mlp must be .* depth = 1, got 2"),
    "drop paths too few": ({"depth": 2, "drop_path": [0.1]}, ValueError, ": drop_path must be .* depth = 2, got 1"),
    "drop path beyond 1": ({"drop_path": 1.5}, ValueError, r": drop_path must be in \[0, 1\), got 1.5"),
    "mixer changes the width": (
        {"depth": 2, "mixer": [AGGREGATED, lambda dim: nn.Linear(dim, dim + 1)]},
        ValueError,
        ", block 1, mixer: must keep the shape",
    ),
    "mixer changes the grid": (
        {"mixer": lambda dim: OverlapPatchEmbed(dim, dim, stride=2)},
        ValueError,
        ", block 0, mixer: must keep the shape",
    ),
    "mlp changes the width": ({"mlp": partial(ConvGLU, out_dim=4)}, ValueError, ", block 0, mlp: must keep the shape"),
    "mixer of another width": (
        {"mixer": lambda dim: nn.Linear(dim + 1, dim)},
        ValueError,
        ", block 0, mixer: fails on an input of shape",
    ),
    "mixer of another layout": (
        {"mixer": lambda dim: nn.Conv2d(dim, dim, 1)},
        ValueError,
        ", block 0, mixer: fails on an input of shape",
    ),
    "mixer returns a tuple": ({"mixer": Tuple}, TypeError, ", block 0, mixer: must return a tensor, got tuple"),
    "mixer asserts": ({"mixer": Refusing}, ValueError, ", block 0, mixer: dim should be divisible by 3"),
    "mixer is a name": ({"mixer": "attention"}, TypeError, ", block 0, mixer: expected a factory"),
    "mixer is a module": ({"mixer": Shift(8)}, TypeError, ", block 0, mixer: expected a factory"),
    "mixer makes no module": ({"mixer": lambda dim: dim}, TypeError, ", block 0, mixer: .* torch.nn.Module, got int"),
    "mixer lacks an argument": ({"mixer": AggregatedAttention}, TypeError, ", block 0, mixer: .*num_heads"),
    "mixer has a wrong argument": ({"mixer": partial(AGGREGATED, windows=3)}, TypeError, ", block 0, mixer: .*windows"),
    "downsample of another width": (
        {"downsample": lambda in_chans, dim: nn.Linear(in_chans, dim + 1)},
        ValueError,
        r", downsample: must return maps \(B, H, W, 8\)",
    ),
    "downsample of another layout": (
        {"downsample": lambda in_chans, dim: nn.Conv2d(in_chans, dim, 2, 2)},
        ValueError,
        ", downsample: fails on an input of shape",
    ),
    "downsample makes no module": ({"downsample": lambda in_chans, dim: None}, TypeError, ", downsample: .* NoneType"),
    "norm of another width": ({"norm_layer": lambda dim: nn.LayerNorm(dim + 1)}, ValueError, ", norm_layer: fails on"),
    "norm is a name": ({"norm_layer": "layernorm"}, TypeError, ", norm_layer: expected a factory"),
}


@pytest.mark.parametrize(("slot", "error", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_slot_names_the_stage_and_the_block(slot, error, message):
    with pytest.raises(error, match=f"^stage 1{message}"):
        build({}, slot)


@pytest.mark.parametrize("kwargs", [{"dim": 0}, {"dim": 8.0}, {"depth": 0}, {"depth": "2"}])
def test_wrong_dim_or_depth(kwargs):
    with pytest.raises(ValueError, match=f"{next(iter(kwargs))} of a Stage must be a positive integer"):
        Stage(**{"dim": 8, "depth": 1, "mixer": AGGREGATED, "mlp": ConvGLU, **kwargs})


@pytest.mark.parametrize("stages", [[], [None], Stage(dim=8, depth=1, mixer=AGGREGATED, mlp=ConvGLU), ["stage"]])
def test_wrong_stages(stages):
    with pytest.raises(TypeError, match="stages"):
        Backbone(stages)


def test_a_declaration_can_be_used_again():
    stages = [Stage(dim=8, depth=1, mixer=partial(LengthScaledCosineAttention, num_heads=2), mlp=ConvGLU)]
    first, second = Backbone(stages), Backbone(stages)
    assert not {id(p) for p in first.parameters()} & {id(p) for p in second.parameters()}
