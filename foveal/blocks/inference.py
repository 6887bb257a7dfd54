"""The second reading of the blocks: the same modules, the same numbers, as fused ops on their weights.

A block's forward is its equation and calls its children. In inference on the CPU a stage reads its blocks here
instead, where nobody has altered them: a bias is left to the pass that comes next anyway, and a sum is joined to the
norm after it. A reading returns a branch in two parts whose sum it is, a map and a bias ``(C,)`` or None.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from foveal.blocks._checks import grid_of
from foveal.blocks._plain import activation_name, are_plain, is_idle, is_plain, is_untouched, weights_of
from foveal.blocks.activate_and_pool import ActivateAndPool
from foveal.blocks.aggregated_attention import AggregatedAttention
from foveal.blocks.conv_glu import ConvGLU
from foveal.blocks.depthwise_conv import convolve
from foveal.blocks.patch_embed import OverlapPatchEmbed
from foveal.blocks.pixel_focused_attention import PixelFocusedAttention
from foveal.ops import activate_and_pool, add_layer_norm, aggregated_attention, conv_glu
from foveal.ops.reference import add_branch, biased


class Branch(NamedTuple):
    """What is added to a residual stream: ``map + bias``."""

    map: Tensor
    bias: Tensor | None = None

    def total(self) -> Tensor:
        return self.map if self.bias is None else biased(self.map, self.bias)


_READINGS: dict[type, Callable[[Any, Tensor], Branch | None]] = {}


def reads(*kinds: type) -> Callable[[Callable], Callable]:
    """Register the reading of block classes. It returns None where a layer that it would read has been altered."""

    def register(reading: Callable) -> Callable:
        _READINGS.update(dict.fromkeys(kinds, reading))
        return reading

    return register


def read(block: nn.Module, x: Tensor) -> Branch:
    """``block(x)``, by its reading if it has one that serves."""
    reading = _READINGS.get(type(block))
    branch = reading(block, x) if reading is not None and is_untouched(block) else None
    return Branch(block(x)) if branch is None else branch


@reads(ConvGLU)
def _conv_glu(block: ConvGLU, x: Tensor) -> Branch | None:
    act = block.fused_act(x)
    if act is None:
        return None
    weights = [*weights_of(block.fc1, block.dwconv), block.fc2.weight, None]
    return Branch(conv_glu(x, *weights, act=act), block.fc2.bias)


@reads(PixelFocusedAttention, AggregatedAttention)
def _pixel_focused_attention(block: PixelFocusedAttention, x: Tensor) -> Branch | None:
    if not are_plain(x, block.qkv, block.proj) or not is_idle(block.proj_drop, x):
        return None
    q, k, v = block.heads(F.linear(x, block.qkv.weight), 3)
    pooled = _activate_and_pool(block.pool, x, block.key_grid(grid_of(x)))
    k_pool, v_pool = block.heads(block.pooled_kv(pooled), 2)
    bias = None if block.qkv.bias is None else block.qkv.bias.unflatten(0, (3, block.num_heads, -1))
    out = aggregated_attention(q, k, v, k_pool, v_pool, **block.terms(x), input_bias=bias)
    return Branch(F.linear(out.flatten(3), block.proj.weight), block.proj.bias)


@reads(OverlapPatchEmbed)
def _overlap_patch_embed(block: OverlapPatchEmbed, x: Tensor) -> Branch:
    return Branch(normalize(convolve(block.proj, x), block.norm))


def _activate_and_pool(pool: ActivateAndPool, x: Tensor, grid: tuple[int, int]) -> Tensor:
    if type(pool) is not ActivateAndPool or not is_untouched(pool) or not is_plain(pool.proj, x):
        return pool(x, grid)
    act = activation_name(pool.act, x)
    if act is None:
        return pool(x, grid)
    pooled = activate_and_pool(F.linear(x, pool.proj.weight), grid, act, input_bias=pool.proj.bias)
    return normalize(pooled, pool.norm)


def normalize(x: Tensor, norm: nn.Module) -> Tensor:
    """``norm(x)``."""
    return add_and_normalize(x, None, norm)[1]


def add_and_normalize(
    x: Tensor, branch: Branch | None, norm: nn.Module, owned: bool = False
) -> tuple[Tensor, Tensor, bool]:
    """A stream with a branch added, its norm, and whether nobody else holds the stream."""
    if type(norm) is not nn.LayerNorm or not is_plain(norm, x):
        x = add(x, branch)
        return x, norm(x), False
    y, bias = branch or (None, None)
    inplace = owned and y is not None and y.dtype == x.dtype
    x, normed = add_layer_norm(x, y, norm.weight, norm.bias, norm.eps, y_bias=bias, inplace=inplace)
    return x, normed, owned or y is not None


def add(x: Tensor, branch: Branch | None) -> Tensor:
    return x if branch is None else add_branch(x, branch.map, branch.bias)
