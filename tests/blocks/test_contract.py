"""What every block promises, whatever it computes: errors, devices, dtypes, initialisation, copies, compilers."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from foveal import blocks
from foveal.blocks import (
    GLU,
    ActivateAndPool,
    AggregatedAttention,
    ConvFFN,
    ConvGLU,
    ConvGLUType1,
    ConvGLUType2,
    ConvGLUType3,
    LengthScaledCosineAttention,
    LogCPB,
    OverlapPatchEmbed,
    PixelFocusedAttention,
    SpatialReductionAttention,
)
from tests.helpers import GRIDS, assert_near, randomised

# Every block that maps (B, H, W, 8), with its switches in different places.
MAPS = {
    "PixelFocusedAttention": lambda **dd: PixelFocusedAttention(8, 2, pool_ratio=2, **dd),
    "AggregatedAttention": lambda **dd: AggregatedAttention(8, 2, pool_ratio=2, pretrain_grid=4, **dd),
    "AggregatedAttention, window log-CPB": lambda **dd: AggregatedAttention(8, 2, window_bias="log-cpb", **dd),
    "AggregatedAttention, linear mode": lambda **dd: AggregatedAttention(8, 2, pool_grid=(3, 2), **dd),
    "AggregatedAttention, learned pool bias": lambda **dd: AggregatedAttention(
        8, 2, pool_grid=2, pool_bias="learned", **dd
    ),
    "AggregatedAttention, interpolated": lambda **dd: AggregatedAttention(
        8, 2, pool_ratio=2, bias_resampling="interpolate", bias_grid=(4, 4), **dd
    ),
    "LengthScaledCosineAttention": lambda **dd: LengthScaledCosineAttention(8, 2, pretrain_grid=4, **dd),
    "LengthScaledCosineAttention, interpolated": lambda **dd: LengthScaledCosineAttention(
        8, 2, bias_resampling="interpolate", bias_grid=4, **dd
    ),
    "SpatialReductionAttention": lambda **dd: SpatialReductionAttention(8, 2, sr_ratio=2, **dd),
    "ConvGLU": lambda **dd: ConvGLU(8, **dd),
    "ConvGLU, own activation": lambda **dd: ConvGLU(8, act_layer=nn.Tanh, **dd),
    "ConvGLUType1": lambda **dd: ConvGLUType1(8, **dd),
    "ConvGLUType2": lambda **dd: ConvGLUType2(8, **dd),
    "ConvGLUType3": lambda **dd: ConvGLUType3(8, **dd),
    "GLU": lambda **dd: GLU(8, **dd),
    "ConvFFN": lambda **dd: ConvFFN(8, **dd),
    "OverlapPatchEmbed": lambda **dd: OverlapPatchEmbed(8, 8, patch_size=3, stride=2, **dd),
}


@pytest.fixture(params=MAPS.values(), ids=MAPS)
def build(request):
    return request.param


def test_every_public_block_is_covered():
    assert {type(build()).__name__ for build in MAPS.values()} | {"ActivateAndPool", "LogCPB"} == set(blocks.__all__)


def test_empty_batch(build):
    out = build()(torch.randn(0, 5, 6, 8, requires_grad=True))
    assert out.shape[0] == 0
    out.sum().backward()


def test_strided_input(build):
    block = build()
    x = torch.randn(2, 8, 6, 5).permute(0, 3, 2, 1)
    assert_near(block(x), block(x.contiguous()))


def test_one_size_after_another_equals_a_fresh_block(build):
    block = randomised(build()).eval()
    for grid in [*GRIDS, *reversed(GRIDS)]:
        fresh = build().eval()
        fresh.load_state_dict(block.state_dict())
        x = torch.randn(1, *grid, 8)
        with torch.no_grad():
            assert torch.equal(block(x), fresh(x))


def test_device_and_dtype_arguments(build):
    block = build(device="meta", dtype=torch.float64)
    tensors = [*block.parameters(), *block.buffers()]
    assert all(t.device.type == "meta" and t.dtype == torch.float64 for t in tensors)
    out = block(torch.empty(2, 5, 6, 8, device="meta", dtype=torch.float64))
    assert out.device.type == "meta"
    assert out.dtype == torch.float64
    assert out.shape == build()(torch.randn(2, 5, 6, 8)).shape


def test_meta_then_real_is_initialised_anew(build):
    block = build(device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.fill_(float("nan"))
    for module in reversed(list(block.modules())):
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for (name, parameter), reference in zip(block.named_parameters(), build().parameters(), strict=True):
        assert parameter.isfinite().all(), name
        assert math.isclose(
            *(p.detach().std(correction=0) for p in (parameter, reference)), rel_tol=0.6, abs_tol=1e-3
        ), name


def test_meta_after_real_leaves_no_meta_tensor_behind(build):
    """A forward on the meta device must not poison what real forwards look up, or the other way round."""
    x = torch.randn(1, 5, 6, 8)
    block = randomised(build()).eval()
    expected = block(x)
    copy.deepcopy(block).to("meta")(x.to("meta"))
    assert torch.equal(block(x), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_of_the_result(build, dtype):
    block = build().to(dtype)
    x = torch.randn(2, 5, 6, 8, dtype=dtype, requires_grad=True)
    out = block(x)
    out.float().square().sum().backward()
    assert out.dtype == dtype
    assert x.grad.dtype == dtype
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in block.parameters())


def test_bfloat16_is_close_to_float32(build):
    block = build()
    x = torch.randn(2, 6, 7, 8)
    assert_near(copy.deepcopy(block).bfloat16()(x.bfloat16()).float(), block(x), tol=0.04)


def test_autocast_is_close_to_float32(build):
    block = build()
    x = torch.randn(2, 6, 7, 8)
    expected = block(x)
    expected.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in block.named_parameters()}
    block.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        out = block(x)
    assert_near(out.float(), expected, tol=0.04)
    out.float().square().sum().backward()
    floor = 0.05 * max(g.abs().max() for g in gradients.values())
    for name, p in block.named_parameters():
        assert p.grad.dtype == torch.float32
        error = (p.grad - gradients[name]).abs().max()
        assert error <= max(0.1 * gradients[name].abs().max(), floor), name


def test_deepcopy_pickle_and_state_dict(build):
    block = randomised(build()).eval()
    x = torch.randn(1, 5, 6, 8)
    expected = block(x)
    loaded = build().eval()
    loaded.load_state_dict(block.state_dict())
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block)), loaded):
        assert torch.equal(twin(x), expected)


def compiled_at_two_sizes(block):
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
    return [(compiled(x), block(x)) for x in (torch.randn(2, 6, 8, 8), torch.randn(2, 9, 11, 8))]


def test_compiles_without_a_graph_break(build):
    with torch.no_grad():
        for actual, expected in compiled_at_two_sizes(randomised(build()).eval()):
            assert_near(actual, expected)


@pytest.mark.parametrize("name", ["AggregatedAttention", "LengthScaledCosineAttention", "ConvGLU"])
def test_compiles_for_training_without_a_graph_break(name):
    block = randomised(MAPS[name]())
    for results in compiled_at_two_sizes(block):
        actual, expected = (torch.autograd.grad(y.square().sum(), list(block.parameters())) for y in results)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-3, atol=1e-3)


def test_exports(build):
    block = randomised(build()).eval()
    x = torch.randn(2, 6, 8, 8)
    program = torch.export.export(block, (x,))
    assert_near(program.module()(x), block(x))


# Errors at the door.

ATTENTION = [PixelFocusedAttention, AggregatedAttention]
LENGTH_SCALED = [*ATTENTION, LengthScaledCosineAttention]
MLPS = [ConvGLU, ConvGLUType1, ConvGLUType2, ConvGLUType3, GLU, ConvFFN]
WRONG = [
    *((layer, (8, 3), {}, "num_heads") for layer in (*LENGTH_SCALED, SpatialReductionAttention)),
    *((layer, (8, 0), {}, "num_heads") for layer in (*LENGTH_SCALED, SpatialReductionAttention)),
    *((layer, (8, 2), {"attn_drop": 1.0}, "attn_drop") for layer in LENGTH_SCALED),
    *((layer, (8, 2), {"proj_drop": 1.5}, "proj_drop|dropout") for layer in (*ATTENTION, SpatialReductionAttention)),
    *(
        (layer, (8, 2), {name: value}, name)
        for layer in ATTENTION
        for name, value in [
            ("window_size", 4),
            ("window_size", 0),
            ("window_size", -3),
            ("window_size", 3.0),
            ("pool_ratio", 0),
            ("pool_ratio", 2.0),
            ("pool_grid", (7,)),
            ("pool_grid", 7.0),
            ("pool_grid", (0, 7)),
            ("pool_grid", (7.0, 7)),
            ("pretrain_grid", (3, -1)),
            ("pretrain_grid", 0),
            ("bias_grid", (0, 1)),
            ("window_bias", "log_cpb"),
            ("pool_bias", "dense"),
            ("bias_resampling", "bilinear"),
        ]
    ),
    *((layer, (8, 2), {"pool_bias": "learned"}, "pool_grid") for layer in ATTENTION),
    *((layer, (8, 2), {"bias_resampling": "interpolate"}, "bias_grid") for layer in LENGTH_SCALED),
    (LengthScaledCosineAttention, (8, 2), {"position_bias": "learned"}, "position_bias"),
    (LengthScaledCosineAttention, (8, 2), {"pretrain_grid": (1, 2, 3)}, "pretrain_grid"),
    (SpatialReductionAttention, (8, 2), {"sr_ratio": 0}, "sr_ratio"),
    (SpatialReductionAttention, (8, 2), {"attn_drop": -0.1}, "attn_drop"),
    *((layer, (8, 0), {}, "hidden_dim") for layer in MLPS),
    *((layer, (8, 8, -1), {}, "out_dim") for layer in MLPS),
    *((layer, (8,), {"kernel_size": 2}, "kernel_size") for layer in MLPS if layer is not GLU),
    (LogCPB, (0,), {}, "num_heads"),
    (LogCPB, (2,), {"hidden_dim": 0}, "hidden_dim"),
    (OverlapPatchEmbed, (3, 8), {"patch_size": 4}, "patch_size"),
    (OverlapPatchEmbed, (3, 8), {"stride": 0}, "stride"),
]


@pytest.mark.parametrize(("layer", "args", "kwargs", "named"), WRONG)
def test_wrong_argument_is_named(layer, args, kwargs, named):
    with pytest.raises((ValueError, TypeError), match=named):
        layer(*args, **kwargs)


@pytest.mark.parametrize("layer", [*LENGTH_SCALED, *MLPS, OverlapPatchEmbed, ActivateAndPool])
def test_unknown_argument_raises(layer):
    with pytest.raises(TypeError, match="not_an_argument"):
        layer(8, 2, not_an_argument=1)


@pytest.mark.parametrize("shape", [(2, 30, 8), (2, 5, 6, 7), (5, 8, 5, 6), (2, 0, 6, 8), (2, 5, 0, 8), (8,)], ids=str)
def test_wrong_map_is_named(build, shape):
    with pytest.raises(ValueError, match=r"x must have"):
        build()(torch.randn(shape))


@pytest.mark.parametrize("grid", [(0, 2), (2,), (2, 2, 2), (1.5, 2)])
def test_wrong_pooled_grid_is_named(grid):
    with pytest.raises(ValueError, match="grid"):
        ActivateAndPool(8)(torch.randn(1, 4, 4, 8), grid)


# Initialisation and weight decay.


def test_initialisation():
    block = AggregatedAttention(192, 8)
    fan = {
        "qkv.weight": 0.02,
        "proj.weight": 0.02,
        "pool.proj.weight": math.sqrt(2 / 192),
        "query_embedding": 0.02,
        "positional_tokens": 0.02,
        "window_bias": 0.0004,
        "log_cpb.fc1.weight": 0.02,
        "log_cpb.fc2.weight": 0.02,
    }
    state = block.state_dict()
    for name, std in fan.items():
        assert math.isclose(state[name].std().item(), std, rel_tol=0.2), name
        assert abs(state[name].mean().item()) < 0.2 * std, name
    for name in set(state) - set(fan) - {"temperature", "pool.norm.weight"}:
        assert not state[name].any(), name
    assert (state["pool.norm.weight"] == 1).all()
    assert_near(nn.functional.softplus(state["temperature"]), torch.full((8,), 1 / 0.24))


def test_truncated_normals_are_truncated_far_out():
    """timm's and PyTorch's truncation is at +-2 absolute, so at these deviations the draws are practically normal."""
    weight = LengthScaledCosineAttention(192, 8).qkv.weight
    assert 3 < (weight.abs().max() / 0.02) < 6


@pytest.mark.parametrize(
    ("convolution", "std"),
    [
        (lambda: OverlapPatchEmbed(64, 128, patch_size=3).proj, math.sqrt(2 / (9 * 128))),
        (lambda: ConvGLU(384, 1024).dwconv, math.sqrt(2 / 9)),
        (lambda: SpatialReductionAttention(64, 2, sr_ratio=4).sr, math.sqrt(2 / (16 * 64))),
        (lambda: ActivateAndPool(128).proj, math.sqrt(2 / 128)),
    ],
)
def test_initialisation_of_convolutions(convolution, std):
    layer = convolution()
    assert math.isclose(layer.weight.std().item(), std, rel_tol=0.05)
    assert not layer.bias.any()


@pytest.mark.parametrize("layer", [*MLPS])
def test_initialisation_of_linears(layer):
    block = layer(192)
    for linear in (block.fc1, block.fc2):
        assert math.isclose(linear.weight.std().item(), 0.02, rel_tol=0.05)
        assert not linear.bias.any()


@pytest.mark.parametrize(
    ("block", "names"),
    [
        (AggregatedAttention(8, 2), {"temperature", "query_embedding", "window_bias"}),
        (PixelFocusedAttention(8, 2, pool_grid=2, pool_bias="learned", window_bias=None), {"pool_bias"}),
        (PixelFocusedAttention(8, 2), {"window_bias"}),
        (LengthScaledCosineAttention(8, 2), {"temperature", "query_embedding"}),
        (LengthScaledCosineAttention(8, 2, query_embedding=False), {"temperature"}),
        (LogCPB(2), {"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"}),
    ],
)
def test_no_weight_decay(block, names):
    assert block.no_weight_decay() == names
    assert names <= dict(block.named_parameters()).keys()


def test_an_attention_says_what_it_is():
    assert "dim=8, num_heads=2, window_size=3, pool_ratio=4, pretrain_grid=(6, 6)" in repr(
        AggregatedAttention(8, 2, pool_ratio=4, pretrain_grid=6)
    )
    assert "pool_grid=(7, 7)" in repr(AggregatedAttention(8, 2, pool_ratio=4, pool_grid=7))
    assert "dim=8, num_heads=2, pretrain_grid=None" in repr(LengthScaledCosineAttention(8, 2))


def test_a_pooled_grid_goes_before_the_ratio():
    both, grid = (AggregatedAttention(8, 2, pool_grid=2, **kwargs) for kwargs in ({"pool_ratio": 4}, {}))
    assert both.key_grid((12, 12)) == grid.key_grid((12, 12)) == (2, 2)
