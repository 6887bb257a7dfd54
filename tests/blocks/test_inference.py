"""The second reading of the blocks, in inference on the CPU, gives what their equations give."""

from typing import NamedTuple

import pytest
import timm
import torch
from torch import nn

from foveal.blocks import AggregatedAttention, ConvGLU, inference
from foveal.blocks.inference import Branch, add_and_normalize, read
from foveal.models.block import Block
from foveal.models.stage import StageModule
from tests.helpers import assert_near, randomised


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


def stage_of(*blocks, norm=nn.LayerNorm):
    return randomised(StageModule(nn.Identity(), blocks, norm(24))).eval()


def test_a_stage_is_read_with_norms_and_biases_joined_to_their_neighbours(joined):
    stage, x = stage_of(block_of()), torch.randn(2, 6, 5, 24)
    plain = stage(x).detach()
    assert not joined
    with torch.no_grad():
        assert_near(stage(x), plain, tol=1e-6)
    assert [call[1:] for call in joined] == [
        (False, False, False),  # the first norm
        (False, False, False),  # that of the pooled map
        (True, True, False),  # the second norm, after the mixer without its last bias
        (True, True, True),  # that of the stage, where the sum before it lay
    ]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("window_bias", ["learned", None])
def test_the_bias_of_the_projection_is_left_to_the_attention(bias, window_bias, monkeypatch):
    seen = []
    original = inference.aggregated_attention
    monkeypatch.setattr(
        inference,
        "aggregated_attention",
        lambda *args, **kwargs: seen.append(kwargs["input_bias"]) or original(*args, **kwargs),
    )
    mixer = AggregatedAttention(24, num_heads=2, pool_ratio=2, qkv_bias=bias, window_bias=window_bias)
    mixer, x = randomised(mixer).eval(), torch.randn(2, 6, 5, 24)
    with torch.no_grad():
        assert_near(read(mixer, x).total(), mixer.forward(x), tol=1e-6)
        assert_near(mixer(x), mixer.forward(x), tol=1e-6)
        assert [b is not None for b in seen] == [bias] * 2
        mixer.qkv.register_forward_hook(lambda *_: None)
        assert mixer(x).equal(mixer.forward(x))
    assert len(seen) == 2


@pytest.mark.parametrize("replaced", [None, 0, 1, 2])
def test_sums_between_blocks_joined_to_the_next_norm_change_nothing(replaced, joined):
    blocks = [block_of() for _ in range(3)]
    if replaced is not None:
        blocks[replaced] = nn.Linear(24, 24)
    stage, x = stage_of(*blocks), torch.randn(2, 6, 5, 24)
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


@pytest.mark.parametrize("norms", [nn.RMSNorm, timm.layers.LayerNorm], ids=lambda n: n.__name__)
def test_other_norms_are_called(norms, joined):
    stage, x = stage_of(block_of(norms), norm=norms), torch.randn(2, 6, 5, 24)
    plain = stage(x).detach()
    with torch.no_grad():
        assert_near(stage(x), plain, tol=1e-6)
    assert len(joined) == 1  # of the pooled map


def test_a_norm_over_several_dimensions_is_called():
    norm, x = randomised(nn.LayerNorm((5, 24))).eval(), torch.randn(2, 6, 5, 24)
    with torch.no_grad():
        assert inference.normalize(x, norm).equal(norm(x))


def test_a_trace_without_gradients_calls_the_norms(joined):
    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module, qualified_name):
            return not isinstance(module, StageModule | Block | nn.Sequential)

    stage, x = stage_of(block_of()), torch.randn(2, 6, 5, 24)
    with torch.no_grad():
        graph = Tracer().trace(stage)
        assert not joined
        assert_near(torch.fx.GraphModule(stage, graph)(x), stage(x), tol=1e-6)
    assert {"blocks.0.norm1", "blocks.0.norm2"} <= {node.target for node in graph.nodes}


@pytest.mark.parametrize("part", ["mixer", "mlp"])
def test_a_compiled_part_runs_compiled(part):
    torch._dynamo.reset()
    stage, x, graphs = stage_of(block_of()), torch.randn(2, 6, 5, 24), []
    plain = stage(x).detach()
    stage.blocks[0].get_submodule(part).compile(backend=lambda graph, _: graphs.append(graph) or graph)
    with torch.no_grad():
        assert_near(stage(x), plain, tol=1e-6)
    assert graphs


@pytest.mark.parametrize("layer", [AggregatedAttention, ConvGLU])
def test_a_subclass_is_called(layer):
    class Doubled(layer):
        def forward(self, x):
            return 2 * super().forward(x)

    module, x = randomised(Doubled(24, 2)).eval(), torch.randn(2, 6, 5, 24)
    with torch.no_grad():
        branch = read(module, x)
        assert branch.bias is None
        assert branch.map.equal(module(x))


def test_layer_scale_applies_to_the_bias_too(joined):
    block, x = block_of(), torch.randn(2, 6, 5, 24)
    block.scale1, block.scale2 = (randomised(timm.layers.LayerScale(24)) for _ in range(2))
    stage = stage_of(block)
    plain = stage(x).detach()
    with torch.no_grad():
        assert_near(stage(x), plain, tol=1e-6)
    assert not any(call.adds_bias for call in joined)


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


def test_a_branch_in_another_dtype_is_not_added_in_place():
    x, y, norm = torch.randn(3, 24), torch.randn(3, 24).bfloat16(), nn.LayerNorm(24)
    before = x.clone()
    with torch.no_grad():
        total, _, _ = add_and_normalize(x, Branch(y), norm, owned=True)
    assert x.equal(before)
    assert total.dtype == torch.float32


def test_autocast_keeps_the_dtype_of_the_stream():
    stage, x = stage_of(block_of()), torch.randn(2, 6, 5, 24).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        plain = stage(x).detach()
        with torch.no_grad():
            ours = stage(x)
    assert ours.dtype == plain.dtype
    assert_near(ours.float(), plain.float(), tol=2e-2)
