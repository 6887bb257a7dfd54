"""The second reading of the blocks: the same modules, the same numbers up to rounding, as fused ops on their weights.

A block's forward is its equation and calls its children. In inference on the CPU a call of the block, or a stage that
holds it, takes its reading instead, where nobody has altered the block or a child: the bias of a Linear is added by the
op that reads its output, and wide maps are worked off a few images at a time.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from foveal.blocks import _module
from foveal.blocks._checks import Grid, check_map, grid_of_map
from foveal.blocks._convolution import convolve
from foveal.blocks._plain import activation_name, are_plain, is_idle, is_plain, weights_of
from foveal.blocks.activate_and_pool import ActivateAndPool
from foveal.blocks.aggregated_attention import AggregatedAttention
from foveal.blocks.conv_glu import ConvGLU
from foveal.blocks.glu import GLU, ConvGLUType1, ConvGLUType2, ConvGLUType3
from foveal.blocks.patch_embed import OverlapPatchEmbed
from foveal.blocks.pixel_focused_attention import PixelFocusedAttention
from foveal.ops import activate_and_pool, add_layer_norm, aggregated_attention, conv_glu
from foveal.ops._slices import in_slices
from foveal.ops.reference import add_branch, biased


class Branch(NamedTuple):
    """What a reading returns, in two parts whose sum it is: a map, and a bias ``(C,)`` that it may have left apart."""

    map: Tensor
    bias: Tensor | None = None

    def total(self) -> Tensor:
        return self.map if self.bias is None else biased(self.map, self.bias)


def reads(*kinds: type[nn.Module]) -> Callable[[Callable], Callable]:
    """Register the reading of block classes: of a block, its inputs, and whether the last bias may be left apart.

    It returns None where it does not serve: a layer that it would read has been altered, or drops.
    """

    def register(reading: Callable) -> Callable:
        _module.READINGS.update({kind: (kind.forward, reading) for kind in kinds})
        return reading

    return register


def read(block: nn.Module, x: Tensor) -> Branch:
    """``block(x)``, by its reading if it has one that serves."""
    return _module.read(block, x, apart=True) or Branch(block(x))


@reads(ConvGLU)
def _conv_glu(block: ConvGLU, x: Tensor, apart: bool) -> Branch | None:
    check_map(x, block.dim)
    act = activation_name(block.act, x)
    if act is None or not is_idle(block.drop, x) or not are_plain(x, block.fc1, block.dwconv, block.fc2):
        return None
    *weights, bias = weights_of(block.fc1, block.dwconv, block.fc2)
    inside, outside = (None, bias) if apart else (bias, None)
    return Branch(conv_glu(x, *[*weights, inside], act=act), outside)


@reads(GLU, ConvGLUType1, ConvGLUType2, ConvGLUType3)
def _glu(block: GLU, x: Tensor, apart: bool) -> Branch | None:
    check_map(x, block.dim)
    return Branch(in_slices(block.forward, x, 2 * block.hidden_dim)) if are_plain(x, *block.children()) else None


@reads(PixelFocusedAttention, AggregatedAttention)
def _pixel_focused_attention(block: PixelFocusedAttention, x: Tensor, apart: bool) -> Branch | None:
    check_map(x, block.dim)
    drops = block.training and block.attn_drop > 0
    if drops or not are_plain(x, block.qkv, block.proj) or not is_idle(block.proj_drop, x):
        return None
    q, k, v = block.heads(F.linear(x, block.qkv.weight), 3)
    k_pool, v_pool = block.heads(block.pooled_kv(block.pool(x, block.key_grid(grid_of_map(x)))), 2)
    bias = None if block.qkv.bias is None else block.qkv.bias.unflatten(0, (3, block.num_heads, -1))
    out = aggregated_attention(q, k, v, k_pool, v_pool, **block.terms(x), input_bias=bias)
    inside, outside = (None, block.proj.bias) if apart else (block.proj.bias, None)
    return Branch(F.linear(out.flatten(3), block.proj.weight, inside), outside)


@reads(ActivateAndPool)
def _activate_and_pool(pool: ActivateAndPool, x: Tensor, grid: Grid, apart: bool) -> Branch | None:
    check_map(x, pool.dim)
    act = activation_name(pool.act, x)
    if act is None or not is_plain(pool.proj, x):
        return None
    pooled = activate_and_pool(F.linear(x, pool.proj.weight), grid, act, input_bias=pool.proj.bias)
    return Branch(normalize(pooled, pool.norm))


@reads(OverlapPatchEmbed)
def _overlap_patch_embed(block: OverlapPatchEmbed, x: Tensor, apart: bool) -> Branch:
    check_map(x, block.in_chans)
    return Branch(normalize(convolve(block.proj, x), block.norm))


def normalize(x: Tensor, norm: nn.Module) -> Tensor:
    """``norm(x)``."""
    return add_and_normalize(x, None, norm)[1]


def add_and_normalize(
    x: Tensor, branch: Branch | None, norm: nn.Module, owned: bool = False
) -> tuple[Tensor, Tensor, bool]:
    """A stream with a branch added, its norm, and whether nobody else holds the stream."""
    if type(norm) is not nn.LayerNorm or not is_plain(norm, x) or norm.normalized_shape != x.shape[-1:]:
        x = add(x, branch)
        return x, norm(x), False
    y, bias = branch or (None, None)
    inplace = owned and y is not None and y.dtype == x.dtype
    x, normed = add_layer_norm(x, y, norm.weight, norm.bias, norm.eps, y_bias=bias, inplace=inplace)
    return x, normed, owned or y is not None


def add(x: Tensor, branch: Branch | None) -> Tensor:
    return x if branch is None else add_branch(x, branch.map, branch.bias)
