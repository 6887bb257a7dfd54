"""Inference on the CPU, in slices of the batch and with layers joined, gives what the plain way gives."""

import copy
from typing import NamedTuple

import pytest
import timm
import torch
from torch import nn

from foveal.blocks import (
    GLU,
    AggregatedAttention,
    ConvGLU,
    ConvGLUType1,
    ConvGLUType2,
    ConvGLUType3,
    inference,
    pixel_focused_attention,
)
from foveal.blocks.inference import ResidualStream, without_last_bias
from foveal.models.stage import Block, StageModule
from tests.helpers import assert_near, randomised


@pytest.fixture
def rows(monkeypatch):
    """Slices of at most two images of 5 x 4 cells and 20 channels in float32; the sizes that fc2 sees."""
    monkeypatch.setattr(inference, "SLICE_BYTES", 2 * 5 * 4 * 20 * 4 + 3)
    seen = []
    original = nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda x, *args: seen.append(len(x)) or original(x, *args))
    return seen


@pytest.mark.parametrize("layer", [GLU, ConvGLU, ConvGLUType1, ConvGLUType2, ConvGLUType3])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_slices_are_the_whole(layer, batch, rows):
    block = randomised(layer(6, 10, 7)).eval()
    x = torch.randn(batch, 5, 4, 6)
    whole = block(x).detach()
    assert set(rows) == {batch}
    rows.clear()
    with torch.inference_mode():
        assert_near(block(x), whole, tol=1e-6)
    assert max(rows) == min(batch, 2)


def test_one_image_is_the_smallest_slice(rows):
    block, x = ConvGLU(6, 40).eval(), torch.randn(3, 5, 4, 6)
    with torch.no_grad():
        block(x)
    assert set(rows) == {1}


def test_training_is_not_sliced(rows):
    block, x = ConvGLU(6, 10), torch.randn(5, 5, 4, 6)
    with torch.no_grad():
        block(x)
    assert set(rows) == {5}


@pytest.mark.parametrize("name", ["fc1", "act", "dwconv", "fc2"])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_hook_sees_the_whole_batch(name, kind, rows):
    block, x, seen = randomised(ConvGLU(6, 10)).eval(), torch.randn(5, 5, 4, 6), []
    expected = copy.deepcopy(block)(x).detach()
    getattr(getattr(block, name), kind)(lambda module, args, *out: seen.append(len(args[0])))
    with torch.no_grad():
        assert_near(block(x), expected, tol=1e-6)
    # The op holds activation and convolution itself; their hooks are silent, as they are in training.
    assert seen == ([5] if name in ("fc1", "fc2") else [])
    assert set(rows) == {5}


@pytest.mark.parametrize("bias", [True, False])
def test_first_layer_without_its_bias_term(bias):
    block = randomised(ConvGLU(6, 10)).eval()
    if not bias:
        block.fc1.bias = None
    x = torch.randn(2, 5, 4, 6)
    expected = block(x).detach()
    with torch.inference_mode():
        assert_near(block(x), expected, tol=1e-6)


class Join(NamedTuple):
    """A call of the op that joins a norm to what stands before it."""

    x: torch.Tensor
    adds: bool
    adds_bias: bool
    inplace: bool


@pytest.fixture
def joined(monkeypatch):
    calls = []
    original = inference.add_layer_norm

    def recorded(x, y, *args, y_bias, inplace):
        calls.append(Join(x, y is not None, y_bias is not None, inplace))
        return original(x, y, *args, y_bias=y_bias, inplace=inplace)

    monkeypatch.setattr(inference, "add_layer_norm", recorded)
    return calls


def block_of(norms=nn.LayerNorm):
    mixer = AggregatedAttention(24, num_heads=2, pool_ratio=2, pretrain_grid=(6, 6))
    return randomised(Block(24, mixer, ConvGLU(24), [norms(24), norms(24)], lambda dim: nn.Identity(), 0.0)).eval()


def test_norms_and_biases_joined_to_their_neighbours_change_nothing(joined):
    block, x = block_of(), torch.randn(2, 6, 5, 24)
    plain = block(x).detach()
    assert not joined
    with torch.no_grad():
        assert_near(block(x), plain, tol=1e-6)
    assert [call[1:] for call in joined] == [
        (False, False, False),  # the first norm
        (False, False, False),  # that of the pooled map
        (True, True, False),  # the second norm, after the mixer without its last bias
    ]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("window_bias", ["learned", None])
def test_the_bias_of_the_projection_is_left_to_the_attention(bias, window_bias, monkeypatch):
    seen = []
    original = pixel_focused_attention.aggregated_attention
    monkeypatch.setattr(
        pixel_focused_attention,
        "aggregated_attention",
        lambda **operands: seen.append(operands.get("input_bias")) or original(**operands),
    )
    mixer = AggregatedAttention(24, num_heads=2, pool_ratio=2, qkv_bias=bias, window_bias=window_bias)
    mixer, x = randomised(mixer).eval(), torch.randn(2, 6, 5, 24)
    plain = mixer(x).detach()
    with torch.no_grad():
        assert_near(mixer(x), plain, tol=1e-6)
        assert [b is not None for b in seen] == [False, bias]
        hook = mixer.qkv.register_forward_hook(lambda *_: None)
        mixer(x)
        hook.remove()
    assert seen[-1] is None
    weights = mixer.attention_weights(x)
    with torch.no_grad():
        assert_near(mixer.attention_weights(x).pool, weights.pool.detach(), tol=1e-6)


@pytest.mark.parametrize("replaced", [None, 0, 1, 2])
def test_sums_between_blocks_joined_to_the_next_norm_change_nothing(replaced, joined):
    blocks = [block_of() for _ in range(3)]
    if replaced is not None:
        blocks[replaced] = nn.Linear(24, 24)
    stage = randomised(StageModule(nn.Identity(), blocks, nn.LayerNorm(24))).eval()
    x = torch.randn(2, 6, 5, 24)
    plain = stage(x).detach()
    with torch.no_grad():
        assert_near(stage(x), plain, tol=1e-6)
        calls, seen = [call for call in joined if call.x.shape == x.shape], []
        stage.blocks[1].register_forward_hook(lambda module, args, out: seen.append(out))
        assert_near(stage(x), plain, tol=1e-6)
    assert sum(call.adds for call in calls) == {None: 6, 0: 4, 1: 3, 2: 3}[replaced]
    assert [call.adds for call in calls] == [call.adds_bias for call in calls]
    # The first sum lies beside its input, which is not the stream's; the others where the last one lay.
    assert sum(call.inplace for call in calls) == {None: 5, 0: 3, 1: 1, 2: 2}[replaced]
    assert len(seen) == 1


@pytest.mark.parametrize("name", ["norm1", "norm2"])
def test_a_hook_of_a_norm_sees_what_is_normalised(name, joined):
    block, x, seen = block_of(), torch.randn(2, 6, 5, 24), []
    getattr(block, name).register_forward_hook(lambda module, args, out: seen.append((args[0].detach(), out.detach())))
    block(x)
    with torch.no_grad():
        block(x)
    for ours, theirs in zip(*seen, strict=True):
        assert_near(ours, theirs, tol=1e-6)
    assert len(joined) == 2


@pytest.mark.parametrize("norms", [nn.RMSNorm, timm.layers.LayerNorm], ids=lambda n: n.__name__)
def test_other_norms_are_called(norms, joined):
    block, x = block_of(norms), torch.randn(2, 6, 5, 24)
    plain = block(x).detach()
    with torch.no_grad():
        assert_near(block(x), plain, tol=1e-6)
    assert len(joined) == 1


def test_a_norm_over_several_dimensions_is_called():
    norm, x = randomised(nn.LayerNorm((5, 24))).eval(), torch.randn(2, 6, 5, 24)
    with torch.no_grad():
        assert inference.normalize(x, norm).equal(norm(x))


def test_a_trace_without_gradients_calls_the_norms(joined):
    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module, qualified_name):
            return not isinstance(module, Block)

    block, x = block_of(), torch.randn(2, 6, 5, 24)
    with torch.no_grad():
        graph = Tracer().trace(block)
        assert not joined
        assert_near(torch.fx.GraphModule(block, graph)(x), block(x), tol=1e-6)
    assert {"norm1", "norm2"} <= {node.target for node in graph.nodes}


def doubled(module):
    """The module with another forward of its own, as accelerate and some adapters give it."""
    original = module.forward
    module.forward = lambda x, *args: 2 * original(x, *args)


PARTS = ["mixer", "mixer.proj", "mixer.proj_drop", "mixer.pool.proj", "mlp", "mlp.fc1", "mlp.fc2", "mlp.drop"]
PARTS += ["norm1", "norm2", "scale1", "scale2", "drop_path"]


@pytest.mark.parametrize("name", PARTS)
def test_a_forward_of_an_instance_is_called(name):
    block, x = block_of(), torch.randn(2, 6, 5, 24)
    doubled(block.get_submodule(name))
    plain = block(x).detach()
    with torch.no_grad():
        assert_near(block(x), plain, tol=1e-6)


@pytest.mark.parametrize("name", PARTS)
def test_a_hook_that_changes_a_result_is_called(name):
    block, x = block_of(), torch.randn(2, 6, 5, 24)
    block.get_submodule(name).register_forward_hook(lambda module, args, out: 2 * out)
    plain = block(x).detach()
    with torch.no_grad():
        assert_near(block(x), plain, tol=1e-6)


@pytest.mark.parametrize("name", PARTS)
def test_hooks_on_all_modules_see_every_part(name):
    block, seen = block_of(), set()
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.add(module))
    try:
        with torch.no_grad():
            block(torch.randn(2, 6, 5, 24))
    finally:
        handle.remove()
    assert block.get_submodule(name) in seen


@pytest.mark.parametrize("name", ["scale1", "drop_path"])
def test_in_training_every_part_is_called(name):
    block, seen = block_of().train(), []
    block.get_submodule(name).register_full_backward_hook(lambda *_: seen.append(name))
    block(torch.randn(2, 6, 5, 24, requires_grad=True)).sum().backward()
    assert seen


@pytest.mark.parametrize("part", ["mixer", "mlp"])
def test_a_compiled_part_runs_compiled(part):
    torch._dynamo.reset()
    block, x, graphs = block_of(), torch.randn(2, 6, 5, 24), []
    plain = block(x).detach()
    block.get_submodule(part).compile(backend=lambda graph, _: graphs.append(graph) or graph)
    with torch.no_grad():
        assert_near(block(x), plain, tol=1e-6)
    assert graphs


@pytest.mark.parametrize("layer", [AggregatedAttention, ConvGLU])
def test_a_subclass_with_a_forward_of_its_own(layer):
    class Doubled(layer):
        def forward(self, x):
            return 2 * super().forward(x)

    module = randomised(Doubled(24, 2)).eval()
    x = torch.randn(2, 6, 5, 24)
    plain = module(x).detach()
    with torch.no_grad():
        out, bias = without_last_bias(module, x)
    assert bias is None
    assert_near(out, plain, tol=1e-6)


def test_layer_scale_applies_to_the_bias_too(joined):
    block, x = block_of(), torch.randn(2, 6, 5, 24)
    block.scale1, block.scale2 = (randomised(timm.layers.LayerScale(24)) for _ in range(2))
    plain = block(x).detach()
    with torch.no_grad():
        assert_near(block(x), plain, tol=1e-6)
    assert not any(call.adds_bias for call in joined)


@pytest.mark.parametrize(("name", "kind"), [("drop_path", timm.layers.DropPath), ("mlp.drop", nn.Dropout)])
def test_a_dropout_that_is_left_in_training_drops(name, kind):
    block, x = block_of(), torch.randn(2, 6, 5, 24)
    expected = block(x).detach()
    parent, _, child = name.rpartition(".")
    setattr(block.get_submodule(parent), child, kind(0.999999).train())
    with torch.no_grad():
        assert (block(x) - expected).abs().max() > 0.1
        block.eval()
        assert_near(block(x), expected, tol=1e-6)


@pytest.mark.parametrize("norms", [nn.LayerNorm, nn.Identity], ids=lambda n: n.__name__)
def test_maps_that_others_hold_keep_their_values(norms):
    """Mixers that keep or return what they are given, and the input of the stage."""

    class Keeper(nn.Module):
        def forward(self, x):
            self.kept, self.value = x, x.clone()
            return x

    blocks = [Block(24, Keeper(), Keeper(), [norms(24), nn.LayerNorm(24)], nn.Identity, 0.0) for _ in range(3)]
    stage, x = StageModule(nn.Identity(), blocks, norms(24)).eval(), torch.randn(2, 6, 5, 24)
    plain, before = stage(x).detach(), x.clone()
    with torch.no_grad():
        assert_near(stage(x), plain, tol=1e-6)
    assert x.equal(before)
    for block in blocks:
        for keeper in (block.mixer, block.mlp):
            assert keeper.kept.equal(keeper.value)


def test_the_total_of_a_stream_is_its_callers():
    norm = nn.LayerNorm(24)
    stream = ResidualStream(torch.randn(3, 24))
    with torch.no_grad():
        stream.add(torch.randn(3, 24))
        stream.normalize(norm)
        total = stream.total()
        before = total.clone()
        stream.add(torch.randn(3, 24), torch.randn(24))
        stream.normalize(norm)
    assert total.equal(before)
    assert not stream.total().equal(before)


def test_autocast_keeps_the_dtype_of_the_stream():
    block, x = block_of(), torch.randn(2, 6, 5, 24).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        plain = block(x).detach()
        with torch.no_grad():
            ours = block(x)
    assert ours.dtype == plain.dtype
    assert_near(ours.float(), plain.float(), tol=2e-2)


@pytest.mark.parametrize("name", ["mixer.qkv", "mixer.proj", "mixer.pool.proj", "mlp.fc1", "mlp.fc2"])
def test_adapted_layers_are_called(name):
    """LoRA, quantisation and the like replace a Linear; its weight alone would miss what they add."""

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    block, x = block_of(), torch.randn(2, 6, 5, 24)
    block.get_submodule(name).__class__ = Doubled
    expected = block(x).detach()
    with torch.inference_mode():
        assert_near(block(x), expected, tol=1e-6)
