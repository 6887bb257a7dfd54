"""Whatever is done to a child of a block shows in the result: every child of every block, altered in every way."""

import warnings

import pytest
import torch
from timm.layers import DropPath, LayerScale
from torch import nn

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
    SpatialReductionAttention,
)
from foveal.models.block import Block
from foveal.models.stage import StageModule
from foveal.ops import backend
from tests.blocks.alterations import CALLS, WEIGHTS
from tests.blocks.equations import run
from tests.helpers import randomised

DIM, GRID = 8, (5, 6)


def norms():
    return [nn.LayerNorm(DIM) for _ in range(2)]


def block_of(mixer, mlp):
    return Block(DIM, mixer, mlp, norms(), lambda dim: LayerScale(dim, 0.5), 0.0)


def stage_of():
    """Two blocks as a backbone has them, so that its sums and norms are joined in inference."""
    blocks = []
    for _ in range(2):
        mixer = AggregatedAttention(DIM, 2, pool_ratio=2)
        blocks.append(Block(DIM, mixer, ConvGLU(DIM, 12), norms(), lambda dim: nn.Identity(), 0.1))
    return StageModule(OverlapPatchEmbed(DIM, DIM, patch_size=3, stride=1), blocks, nn.LayerNorm(DIM))


BLOCKS = {
    "ConvGLU": lambda: ConvGLU(DIM, 12),
    "ConvGLU with dropout": lambda: ConvGLU(DIM, 12, drop=0.2),
    "GLU": lambda: GLU(DIM, 12),
    "ConvGLUType1": lambda: ConvGLUType1(DIM, 12),
    "ConvGLUType2": lambda: ConvGLUType2(DIM, 12),
    "ConvGLUType3": lambda: ConvGLUType3(DIM, 12),
    "ConvFFN": lambda: ConvFFN(DIM, 12),
    "OverlapPatchEmbed": lambda: OverlapPatchEmbed(DIM, DIM, patch_size=3, stride=2),
    "ActivateAndPool": lambda: ActivateAndPool(DIM),
    "LogCPB": lambda: LogCPB(2, hidden_dim=16),
    "AggregatedAttention": lambda: AggregatedAttention(DIM, 2, pool_ratio=2),
    "LengthScaledCosineAttention": lambda: LengthScaledCosineAttention(DIM, 2),
    "SpatialReductionAttention": lambda: SpatialReductionAttention(DIM, 2, sr_ratio=2),
    "Block": lambda: block_of(LengthScaledCosineAttention(DIM, 2), GLU(DIM, 12)),
    "StageModule": stage_of,
}


def inputs_of(block):
    x = torch.randn(2, *GRID, DIM, dtype=torch.float64)
    if isinstance(block, LogCPB):
        return GRID, (2, 3), GRID, x
    return (x, (2, 3)) if isinstance(block, ActivateAndPool) else (x,)


def call(block, *inputs):
    return block(*inputs[:-1], like=inputs[-1]) if isinstance(block, LogCPB) else block(*inputs)


def built(name, child, alter):
    torch.manual_seed(0)
    block = randomised(BLOCKS[name]().double(), 0.5)
    if child is not None:
        parent, _, attribute = child.rpartition(".")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the older weight norm is still in use
            alter(block.get_submodule(parent), attribute)
    return block


def results(function, block, inputs, training):
    """The output and, in training, the gradients of all leaves by name."""
    block.train(training)
    torch.manual_seed(1)
    with torch.set_grad_enabled(training):
        out = function(block, *inputs)
        out = out.dense() if hasattr(out, "dense") else out
    found = {"output": out.detach()}
    if training:
        leaves = {n: p for n, p in block.named_parameters() if p.requires_grad}
        leaves.update({f"input {i}": x for i, x in enumerate(inputs) if getattr(x, "requires_grad", False)})
        torch.manual_seed(2)
        grads = torch.autograd.grad(out, list(leaves.values()), torch.randn_like(out), materialize_grads=True)
        found.update(zip(leaves, grads, strict=True))
    return found


def differ(found, expected):
    """Which results are not those of the equation, in float64."""
    assert found.keys() == expected.keys()
    scale = max(value.abs().max().item() for value in expected.values())
    return [name for name in found if not (found[name] - expected[name]).abs().max() <= 1e-9 * scale]


def cases():
    for name in BLOCKS:
        for child, layer in built(name, None, None).named_modules():
            if not child or child.startswith("blocks.1"):
                continue
            marks = [pytest.mark.slow] if name == "StageModule" and child.count(".") > 2 else []
            for kind, alter in CALLS.items():
                if isinstance(layer, LogCPB | ActivateAndPool) and kind in ("compiled", "replaced_by_a_sequence"):
                    continue  # more than a map comes in, or out
                if kind == "compiled" and len(list(layer.children())) > 0:
                    continue  # their children are compiled one by one
                yield pytest.param(name, child, alter, id=f"{name}-{child}-{kind}", marks=marks)
            if isinstance(layer, nn.Linear | nn.Conv2d):
                for kind, alter in WEIGHTS.items():
                    yield pytest.param(name, child, alter, id=f"{name}-{child}-{kind}", marks=marks)


@pytest.fixture(params=["auto", "reference"], autouse=True)
def _backend(request):
    with backend(request.param):
        yield


@pytest.mark.parametrize(("name", "child", "alter"), list(cases()))
def test_an_altered_child_shows(name, child, alter):
    for training in (False, True):
        ours, theirs = built(name, child, alter), built(name, child, alter)
        inputs = inputs_of(ours)
        inputs = [x.requires_grad_(training) if isinstance(x, torch.Tensor) else x for x in inputs]
        for _ in range(1 if training else 2):  # what a first call leaves behind must not serve the second
            found, expected = results(call, ours, inputs, training), results(run, theirs, inputs, training)
            assert not differ(found, expected), f"training={training}"


@pytest.mark.parametrize("name", BLOCKS)
def test_an_unaltered_block_is_its_equation(name):
    for training in (False, True):
        block = built(name, None, None)
        inputs = [x.requires_grad_(training) if isinstance(x, torch.Tensor) else x for x in inputs_of(block)]
        assert not differ(results(call, block, inputs, training), results(run, block, inputs, training))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", BLOCKS)
def test_hooks_on_all_modules_see_every_child(name, training):
    block, seen = built(name, None, None), set()
    inputs = inputs_of(block)
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.add(module))
    try:
        results(call, block, inputs, training)
    finally:
        handle.remove()
    assert seen >= set(block.modules())


@pytest.mark.parametrize(
    "change",
    [
        lambda conv: (
            setattr(conv, "padding_mode", "reflect") or conv.__setattr__("_reversed_padding_repeated_twice", [1] * 4)
        ),
        lambda conv: (setattr(conv, "dilation", (2, 2)), setattr(conv, "padding", (2, 2))),
        lambda conv: (
            setattr(conv, "weight", nn.Parameter(torch.randn(12, 1, 1, 1, dtype=torch.float64)))
            or setattr(conv, "padding", (0, 0))
        ),
    ],
    ids=["padding mode", "dilation", "kernel"],
)
def test_a_convolution_set_up_otherwise(change):
    for training in (False, True):
        block = built("ConvGLU", None, None)
        change(block.dwconv)
        inputs = inputs_of(block)
        assert not differ(results(call, block, inputs, training), results(run, block, inputs, training))


@pytest.mark.parametrize(("name", "kind"), [("drop_path", DropPath), ("mlp.drop", nn.Dropout)])
def test_a_dropout_that_is_left_in_training_drops(name, kind):
    stage = built("StageModule", None, None).eval()
    (x,) = inputs_of(stage)
    with torch.no_grad():
        expected = stage(x)
        parent, _, child = f"blocks.0.{name}".rpartition(".")
        setattr(stage.get_submodule(parent), child, kind(0.999999).train())
        assert (stage(x) - expected).abs().max() > 1e-3
        stage.eval()
        assert (stage(x) - expected).abs().max() < 1e-12


@pytest.mark.parametrize("kind", [ConvGLU, AggregatedAttention, ActivateAndPool, OverlapPatchEmbed, Block, GLU])
def test_a_forward_that_is_replaced_for_the_whole_class(kind, monkeypatch):
    original = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, *args: 3 * original(self, *args))
    stage = built("StageModule", None, None).eval()
    (x,) = inputs_of(stage)
    if kind is GLU:
        stage, x = GLU(DIM, 12).double().eval(), x
    plain = stage(x).detach()
    with torch.no_grad():
        torch.testing.assert_close(stage(x), plain)


class Watched(nn.Module):
    """A sequence of blocks in a container of the user's own."""

    def __init__(self, blocks):
        super().__init__()
        self.blocks, self.calls = blocks, 0

    def forward(self, x):
        self.calls += 1
        return self.blocks(x).relu()


class Rectified(nn.Sequential):
    def forward(self, x):
        return super().forward(x).relu()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("replace", [Watched, lambda blocks: Rectified(*blocks)], ids=["wrapped", "subclassed"])
def test_blocks_in_another_container(replace, checkpointing):
    stage = built("StageModule", None, None)
    for block in stage.blocks:
        block.drop_path = nn.Identity()
    (x,) = inputs_of(stage)
    stage.blocks = replace(stage.blocks)
    expected = stage.norm(stage.blocks(stage.downsample(x)))
    stage.grad_checkpointing = checkpointing
    for training in (True, False):
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                torch.testing.assert_close(stage.train(training)(x), expected)


def test_a_hook_on_checkpointed_blocks_runs():
    stage, seen = built("StageModule", None, None).train(), []
    stage.grad_checkpointing = True
    stage.blocks.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    stage(*inputs_of(stage))
    assert seen


@pytest.mark.parametrize("name", ["attn_drop", "proj_drop", "drop", "drop_path"])
def test_dropout_in_training_mode_without_gradients(name):
    """Monte-Carlo dropout, or a teacher that is left in training mode."""
    stage = built("StageModule", None, None).train()
    for module in stage.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 0.0
        if name == "attn_drop" and hasattr(module, "attn_drop"):
            module.attn_drop = 0.5
        if isinstance(getattr(module, name, None), nn.Dropout):
            setattr(module, name, nn.Dropout(0.5))
    if name == "drop_path":
        stage.blocks[0].drop_path = DropPath(0.5)
    (x,) = inputs_of(stage)
    with torch.no_grad():
        results = [stage(x) for _ in range(8)]
        assert any(not torch.equal(result, results[0]) for result in results)
        stage.eval()
        assert torch.equal(stage(x), stage(x))


def test_the_window_asks_log_cpb_too():
    block = AggregatedAttention(DIM, 2, window_bias="log-cpb", pool_bias=None).double()
    (x,) = inputs_of(block)
    plain = block(x)
    block.log_cpb.register_forward_hook(lambda module, args, out: out._replace(table=100 * out.table))
    assert not torch.allclose(block(x), plain)


@pytest.mark.parametrize("method", ["mix", "gated"])
@pytest.mark.parametrize("training", [False, True])
def test_a_subclass_that_overrides_a_part(method, training):
    original = getattr(ConvGLU, method)
    doubled = type("Doubled", (ConvGLU,), {method: lambda self, *args: 2 * original(self, *args)})
    ours, plain = randomised(doubled(DIM, 12)).train(training), ConvGLU(DIM, 12).train(training)
    plain.load_state_dict(ours.state_dict())
    with torch.no_grad():
        plain.fc2.weight.mul_(2)
        x = torch.randn(1, *GRID, DIM)
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(ours(x), plain(x))


def test_an_own_forward_after_compilation():
    torch._dynamo.reset()
    block, x = randomised(ConvGLU(DIM, 12)).eval(), torch.randn(1, *GRID, DIM)
    compiled = torch.compile(block, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), block(x))
        forward = block.fc2.forward
        block.fc2.forward = lambda value: 5 * forward(value)
        torch.testing.assert_close(compiled(x), block(x))


def test_a_norm_that_does_not_fit_raises_as_it_would():
    stage = built("StageModule", None, None).eval()
    stage.blocks[0].norm1 = nn.LayerNorm(DIM // 2, elementwise_affine=False)
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match="normalized_shape"):
            stage(*inputs_of(stage))
