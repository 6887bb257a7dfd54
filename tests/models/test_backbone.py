"""Backbone: any stack of stages, at home in timm, at any image size."""

import copy
import math
import pickle
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from timm.layers import DropPath
from torch import nn

from foveal.blocks import (
    GLU,
    AggregatedAttention,
    ConvFFN,
    ConvGLU,
    LengthScaledCosineAttention,
    OverlapPatchEmbed,
    PixelFocusedAttention,
    SpatialReductionAttention,
)
from foveal.models import Backbone, Stage
from tests.helpers import assert_near, randomised

AGGREGATED = partial(AggregatedAttention, num_heads=2, pool_ratio=2)
GLOBAL = partial(LengthScaledCosineAttention, num_heads=2)


def stage(dim=8, depth=1, mixer=AGGREGATED, mlp=ConvGLU, **kwargs):
    return Stage(dim=dim, depth=depth, mixer=mixer, mlp=mlp, **kwargs)


def pyramid(**kwargs):
    """Three stages, two kinds of mixers."""
    stages = [stage(8), stage(16, depth=2, mixer=[AGGREGATED, GLOBAL]), stage(24, mixer=GLOBAL)]
    return Backbone(stages, **{"num_classes": 5, **kwargs})


@pytest.fixture
def net():
    return randomised(pyramid()).eval()


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("size", [(64, 96), (33, 65), (1, 1)])
def test_any_number_of_stages(count, size):
    net = Backbone([stage(8 * (i + 1)) for i in range(count)], num_classes=5)
    x = torch.randn(2, 3, *size)
    assert net(x).shape == (2, 5)
    reductions = [4 * 2**i for i in range(count)]
    assert [info["reduction"] for info in net.feature_info] == reductions
    assert [info["num_chs"] for info in net.feature_info] == [8 * (i + 1) for i in range(count)]
    for i, features in enumerate(net.forward_intermediates(x, intermediates_only=True)):
        assert features.shape == (2, 8 * (i + 1), *(math.ceil(side / reductions[i]) for side in size))


def test_forward_is_features_and_head(net):
    x = torch.randn(2, 3, 64, 48)
    features = net.forward_features(x)
    assert features.shape == (2, 24, 4, 3)
    assert torch.equal(net.forward_head(features), net(x))
    pooled = features.mean((2, 3))
    assert_near(net.forward_head(features, pre_logits=True), pooled)
    assert_near(net(x), nn.functional.linear(pooled, net.head.fc.weight, net.head.fc.bias))


def test_a_block_is_two_residual_branches(net):
    block, x = net.stages[1].blocks[1], torch.randn(1, 4, 5, 16)
    half = x + block.mixer(block.norm1(x))
    assert_near(block(x), half + block.mlp(block.norm2(half)))


def test_a_stage_is_downsample_blocks_norm(net):
    module, x = net.stages[1], torch.randn(1, 8, 6, 8)
    assert_near(module(x), module.norm(module.blocks[1](module.blocks[0](module.downsample(x)))))


def test_layout_of_intermediates(net):
    x = torch.randn(1, 3, 64, 48)
    last, maps = net.forward_intermediates(x, output_fmt="NHWC")
    for nhwc, nchw in zip(maps, net.forward_intermediates(x, intermediates_only=True), strict=True):
        assert torch.equal(nhwc.permute(0, 3, 1, 2), nchw)
    assert torch.equal(last, net.forward_features(x))
    with pytest.raises(ValueError, match="output_fmt"):
        net.forward_intermediates(x, output_fmt="NLC")


@pytest.mark.parametrize(("indices", "taken"), [(None, [0, 1, 2]), (2, [1, 2]), ([0, 2], [0, 2]), ([-1], [2])])
def test_indices_of_intermediates(net, indices, taken):
    x = torch.randn(1, 3, 64, 48)
    every = net.forward_intermediates(x, intermediates_only=True)
    for stop_early in (False, True):
        some = net.forward_intermediates(x, indices, stop_early=stop_early, intermediates_only=True)
        assert all(torch.equal(a, every[i]) for a, i in zip(some, taken, strict=True))


def test_stop_early_leaves_out_later_stages(net):
    net.stages[2].forward = None
    assert len(net.forward_intermediates(torch.randn(1, 3, 64, 48), [1], stop_early=True)[1]) == 1


def test_prune(net):
    x = torch.randn(1, 3, 64, 48)
    expected, logits = net.forward_intermediates(x, [0, 1], intermediates_only=True), net(x)
    whole = copy.deepcopy(net)
    assert whole.prune_intermediate_layers([2], prune_head=False) == [2]
    assert torch.equal(whole(x), logits)
    assert net.prune_intermediate_layers([0, 1]) == [0, 1]
    assert len(net.stages) == 2
    assert net.num_features == net.head_hidden_size == 16
    assert net(x).shape == (1, 16, 8, 6)
    for actual, wanted in zip(net.forward_intermediates(x, intermediates_only=True), expected, strict=True):
        assert torch.equal(actual, wanted)
    net.set_input_size(96)


def test_reset_classifier(net):
    x = torch.randn(2, 3, 64, 48)
    features = net.forward_features(x)
    net.reset_classifier(7)
    assert (net.num_classes, net.global_pool) == (7, "avg")
    assert net(x).shape == (2, 7)
    assert math.isclose(net.get_classifier().weight.std().item(), 0.02, rel_tol=0.3)
    assert not net.get_classifier().bias.any()
    net.reset_classifier(0)
    assert_near(net(x), features.mean((2, 3)))
    net.reset_classifier(0, "max")
    assert_near(net(x), features.amax((2, 3)))
    net.reset_classifier(0, "")
    assert torch.equal(net(x), features)


def test_set_input_size_moves_only_interpolated_biases():
    interpolating = partial(AGGREGATED, bias_resampling="interpolate")
    net = Backbone([stage(), stage(mixer=interpolating)], img_size=64, pretrain_size=64, num_classes=5)
    followers = [net.stages[0].blocks[0].mixer, net.stages[1].blocks[0].mixer]
    assert [m.pretrain_grid for m in followers] == [(16, 16), (8, 8)]
    net.set_input_size((96, 160))
    assert followers[1].bias_grid == (12, 20)
    assert [m.pretrain_grid for m in followers] == [(16, 16), (8, 8)]
    with pytest.raises(ValueError, match="img_size"):
        net.set_input_size((0, 32))


def test_gradient_checkpointing_changes_nothing():
    net = randomised(pyramid(), std=0.2)
    x = torch.randn(2, 3, 48, 64)

    def run():
        net.zero_grad()
        out = net(x)
        out.square().sum().backward()
        return [out.detach(), *(p.grad for p in net.parameters())]

    plain = run()
    net.set_grad_checkpointing()
    calls = []
    hook = net.stages[0].blocks[0].register_forward_pre_hook(lambda *args: calls.append(1))
    checkpointed = run()
    assert len(calls) == 2  # once forward, once more in backward
    hook.remove()
    for actual, expected in zip(checkpointed, plain, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_drop_path_drops_whole_samples():
    net = Backbone([stage(depth=3, mlp=lambda dim: nn.Linear(dim, dim))], drop_path_rate=0.5, num_classes=0)
    paths = [block.drop_path for block in net.stages[0].blocks]
    assert [type(path) for path in paths] == [nn.Identity, DropPath, DropPath]
    assert [path.drop_prob for path in paths[1:]] == [0.25, 0.5]
    block, x = net.stages[0].blocks[2], torch.randn(400, 1, 1, 8)
    untouched = (block(x) == x).all(-1).float().mean()  # both branches dropped
    assert 0.15 < untouched < 0.35
    assert not (block.eval()(x) == x).all(-1).any()


def test_wrong_images_are_named(net):
    for shape in [(2, 1, 32, 32), (3, 32, 32), (2, 32, 32, 3)]:
        with pytest.raises(ValueError, match=r"x must be images of shape \(B, 3, H, W\)"):
            net(torch.randn(shape))


def test_copies_and_files(net, tmp_path):
    x = torch.randn(1, 3, 48, 64)
    expected = net(x)
    save_file(net.state_dict(), tmp_path / "weights.safetensors")
    torch.save(net.state_dict(), tmp_path / "weights.pth")
    copies = [copy.deepcopy(net), pickle.loads(pickle.dumps(net)), pyramid().eval(), pyramid().eval()]
    copies[2].load_state_dict(load_file(tmp_path / "weights.safetensors"))
    copies[3].load_state_dict(torch.load(tmp_path / "weights.pth", weights_only=True), assign=True)
    for twin in copies:
        assert torch.equal(twin(x), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_device_and_dtype(dtype):
    net = pyramid(device="meta", dtype=dtype)
    assert all(t.is_meta and t.dtype == dtype for t in (*net.parameters(), *net.buffers()))
    out = net(torch.empty(2, 3, 64, 48, device="meta", dtype=dtype))
    assert out.is_meta
    assert out.shape == (2, 5)
    out = pyramid(dtype=dtype)(torch.randn(2, 3, 64, 48, dtype=dtype))
    assert out.dtype == dtype
    assert out.isfinite().all()


def test_autocast_is_close_to_float32(net):
    x = torch.randn(2, 3, 64, 48)
    expected = net(x)
    with torch.autocast("cpu", torch.bfloat16):
        actual = net(x)
        actual.float().sum().backward()
    assert_near(actual.float(), expected, tol=0.1)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_one_graph_serves_every_size():
    """Compiled whole, a second size neither breaks the graph nor compiles it again."""
    torch._dynamo.reset()
    net = randomised(pyramid()).eval()
    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for size in [(64, 96), (80, 48), (128, 112)]:
            x = torch.randn(2, 3, *size)
            assert_near(compiled(x), net(x), tol=1e-4)


def test_compiled_training_step():
    torch._dynamo.reset()
    net = randomised(pyramid(), std=0.2)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 64, 48)
    gradients = [torch.autograd.grad(f(x).square().sum(), list(net.parameters())) for f in (net, compiled)]
    for expected, actual in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


def test_export(net, tmp_path):
    """Exported at one size, saved, loaded: plain PyTorch operators alone, so it runs where foveal is not installed."""
    x = torch.randn(2, 3, 64, 48)
    torch.export.save(torch.export.export(net, (x,)), tmp_path / "net.pt2")
    program = torch.export.load(tmp_path / "net.pt2")
    assert_near(program.module()(x), net(x), tol=1e-4)
    assert not [node for node in program.graph.nodes if "foveal" in str(node.target)]


MIXERS = st.sampled_from(
    [
        AGGREGATED,
        GLOBAL,
        partial(PixelFocusedAttention, num_heads=4, window_size=5),
        partial(AggregatedAttention, num_heads=2, pool_grid=(3, 2), pool_bias="learned"),
        partial(AggregatedAttention, num_heads=4, window_bias="log-cpb", positional_attention=False),
        partial(SpatialReductionAttention, num_heads=2, sr_ratio=2),
        lambda dim: nn.Linear(dim, dim),
    ]
)
STAGES = st.builds(
    lambda dim, mixers, mlp, layer_scale: Stage(
        dim=dim, depth=len(mixers), mixer=mixers, mlp=mlp, layer_scale=layer_scale
    ),
    dim=st.sampled_from([8, 12, 20]),
    mixers=st.lists(MIXERS, min_size=1, max_size=2),
    mlp=st.sampled_from([ConvGLU, GLU, ConvFFN, partial(ConvGLU, hidden_dim=5)]),
    layer_scale=st.sampled_from([None, 0.1]),
)


@settings(deadline=None, max_examples=10, derandomize=True)
@given(
    stages=st.lists(STAGES, min_size=1, max_size=3),
    sizes=st.lists(st.tuples(st.integers(1, 70), st.integers(1, 70)), min_size=2, max_size=2),
    in_chans=st.integers(1, 4),
    pretrain_size=st.sampled_from([None, 32, (48, 64)]),
)
def test_any_declaration_at_any_size(stages, sizes, in_chans, pretrain_size):
    def build():
        return Backbone(stages, in_chans=in_chans, num_classes=3, pretrain_size=pretrain_size)

    net = build()
    for size in sizes:
        x = torch.randn(2, in_chans, *size)
        net.train()
        out, maps = net.forward_intermediates(x)
        for features, info in zip(maps, net.feature_info, strict=True):
            grid = tuple(math.ceil(side / info["reduction"]) for side in size)
            assert features.shape == (2, info["num_chs"], *grid)
        net.zero_grad()
        net.forward_head(out).square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
        fresh = build()
        fresh.load_state_dict(net.state_dict())
        with torch.no_grad():
            assert torch.equal(net.eval()(x), fresh.eval()(x))


def test_default_downsampling(net):
    convolutions = [module.downsample.proj for module in net.stages]
    assert [(c.kernel_size[0], c.stride[0], c.padding[0]) for c in convolutions] == [(7, 4, 3), (3, 2, 1), (3, 2, 1)]
    assert all(isinstance(module.downsample, OverlapPatchEmbed) for module in net.stages)
    assert {n.eps for m in net.stages for n in (m.norm, *(b.norm1 for b in m.blocks))} == {1e-6}
    assert {m.downsample.norm.eps for m in net.stages} == {1e-5}
