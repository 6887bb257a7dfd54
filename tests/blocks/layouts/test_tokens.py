"""Blocks over rows of tokens, with and without prefix tokens."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from foveal.blocks import (
    GLU,
    AggregatedAttention,
    ConvFFN,
    ConvGLU,
    ConvGLUType1,
    ConvGLUType2,
    ConvGLUType3,
    LengthScaledCosineAttention,
    SpatialReductionAttention,
)
from foveal.blocks.layouts import SizedTokens, TokenMixer, Tokens
from tests.helpers import GRIDS, assert_near, randomised

MLPS = [ConvGLU, ConvGLUType1, ConvGLUType2, ConvGLUType3, GLU, ConvFFN]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("layer", [*MLPS, lambda dim: AggregatedAttention(dim, 2, pool_ratio=2)])
def test_equals_the_block(layer, grid):
    block = randomised(layer(8)).eval()
    x = torch.randn(2, *grid, 8)
    expected = block(x).flatten(1, 2)
    assert torch.equal(Tokens(block, grid)(x.flatten(1, 2)), expected)
    assert torch.equal(TokenMixer(block, grid)(x.flatten(1, 2)), expected)
    assert torch.equal(SizedTokens(block)(x.flatten(1, 2), grid), expected)


@pytest.mark.parametrize("prefix", [1, 5])
@pytest.mark.parametrize("layer", MLPS)
def test_cells_do_not_see_prefix_tokens_nor_they_the_cells(layer, prefix):
    block = randomised(layer(8)).eval()
    x = torch.randn(2, prefix + 15, 8)
    out = Tokens(block, (3, 5), prefix)(x)
    assert_near(out[:, prefix:], block(x[:, prefix:].unflatten(1, (3, 5))).flatten(1, 2))
    other = x.clone()
    other[:, prefix:] = torch.randn(2, 15, 8)
    assert torch.equal(Tokens(block, (3, 5), prefix)(other)[:, :prefix], out[:, :prefix])


def test_prefix_tokens_skip_the_depthwise_convolution_alone():
    """Written out: split off after the first Linear, joined before the product."""
    block = randomised(ConvGLU(8, hidden_dim=6)).eval()
    x = torch.randn(2, 3 + 20, 8)
    gate, value = F.linear(x, block.fc1.weight, block.fc1.bias).chunk(2, dim=-1)
    cells = gate[:, 3:].unflatten(1, (4, 5)).permute(0, 3, 1, 2)
    cells = F.conv2d(cells, block.dwconv.weight, block.dwconv.bias, padding=1, groups=6)
    gate = torch.cat((gate[:, :3], cells.flatten(2).transpose(1, 2)), dim=1)
    expected = F.linear(F.gelu(gate) * value, block.fc2.weight, block.fc2.bias)
    assert_near(Tokens(block, (4, 5), num_prefix_tokens=3)(x), expected)


@pytest.mark.parametrize("layer", MLPS)
def test_a_convolution_that_looks_nowhere_treats_all_tokens_alike(layer):
    """With a depthwise kernel of 1 in its middle, the pointwise part is the block."""
    block = randomised(layer(8)).eval()
    if hasattr(block, "dwconv"):
        with torch.no_grad():
            block.dwconv.weight.zero_()[:, :, 1, 1] = 1
            block.dwconv.bias.zero_()
    x = torch.randn(2, 2 + 6, 8)
    assert_near(Tokens(block, (2, 3), 2)(x), block(x[:, None])[:, 0])


def test_dropout_falls_on_prefix_tokens_too():
    block = randomised(ConvGLU(8, hidden_dim=64, drop=0.5)).train()
    out = Tokens(block, (4, 4), 16)(torch.ones(8, 32, 8))
    for part in (out[:, :16], out[:, 16:]):
        assert 0.4 < (part == 0).float().mean() < 0.6


@pytest.mark.parametrize("prefix", [0, 3])
def test_gradients_reach_input_and_parameters(prefix):
    block = randomised(ConvGLU(8))
    x = torch.randn(2, prefix + 6, 8, requires_grad=True)
    Tokens(block, (2, 3), prefix)(x).square().sum().backward()
    assert x.grad.flatten(1).any(1).all()
    assert all(p.grad.any() for p in block.parameters())


def test_copies_export_and_compile():
    adapter = Tokens(randomised(ConvGLU(8)), (3, 5), 2).eval()
    x = torch.randn(2, 17, 8)
    with torch.no_grad():
        expected = adapter(x)
        twins = [copy.deepcopy(adapter), pickle.loads(pickle.dumps(adapter))]
        twins.append(torch.compile(adapter, fullgraph=True, backend="aot_eager"))
        twins.append(torch.export.export(adapter, (x,)).module())
        for twin in twins:
            assert_near(twin(x), expected)


def test_hosts_find_the_layers_that_they_initialise():
    assert Tokens(mlp := ConvGLU(8), 2).fc2 is mlp.fc2
    assert TokenMixer(attention := AggregatedAttention(8, 2), 2).proj is attention.proj


# Errors at the door.


@pytest.mark.parametrize("shape", [(2, 16, 8), (2, 3, 5, 8), (2, 14, 8), (15, 8)], ids=str)
@pytest.mark.parametrize("call", [lambda b, x: Tokens(b, (3, 5))(x), lambda b, x: SizedTokens(b)(x, (3, 5))])
def test_tokens_that_fit_no_grid_raise(call, shape):
    with pytest.raises(ValueError, match="3 x 5 cells"):
        call(ConvGLU(8), torch.randn(shape))


@pytest.mark.parametrize("prefix", [-1, 1.0, None])
def test_wrong_number_of_prefix_tokens_is_named(prefix):
    with pytest.raises(ValueError, match="num_prefix_tokens"):
        Tokens(ConvGLU(8), 3, prefix)


@pytest.mark.parametrize("grid", [(3,), (0, 3), (1.5, 2), "3x5"])
def test_wrong_grid_is_named(grid):
    with pytest.raises((ValueError, TypeError), match="grid"):
        Tokens(ConvGLU(8), grid)


@pytest.mark.parametrize("mixer", [AggregatedAttention, LengthScaledCosineAttention, SpatialReductionAttention])
def test_prefix_tokens_need_a_pointwise_part(mixer):
    with pytest.raises(ValueError, match=f"num_prefix_tokens must be 0 for {mixer.__name__}"):
        Tokens(mixer(8, 2), 3, 1)


@pytest.mark.parametrize("masked", [{"attn_mask": torch.ones(15, 15)}, {"is_causal": True}], ids=["mask", "causal"])
def test_a_mask_is_refused(masked):
    with pytest.raises(ValueError, match="attn_mask and is_causal"):
        TokenMixer(AggregatedAttention(8, 2), (3, 5))(torch.randn(1, 15, 8), **masked)
