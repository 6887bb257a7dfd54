"""Aggregated attention by PyTorch's FlexAttention, as a peer of the op.

The joint softmax is attention over the map's keys and then the pooled ones: a mask leaves of the map what lies in the
window, and the score is modified by both biases. The positional term is outside the softmax, a window's sum of its own.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from foveal import ops
from foveal.ops import PositionBias, reference

Grid = tuple[int, int]


def window_mask(grid: Grid, keys: int, window_size: int, device: torch.device) -> BlockMask:
    """Which of the map's keys, and then of so many pooled ones, a query sees."""
    (height, width), radius = grid, window_size // 2

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        rows, columns = key // width - query // width, key % width - query % width
        return (key >= height * width) | ((rows.abs() <= radius) & (columns.abs() <= radius))

    cells = height * width
    return create_block_mask(seen, None, None, cells, cells + keys, device=device, _compile=device.type != "cpu")


def _add_biases(
    grid: Grid, window_size: int, window_bias: Tensor, pool_bias: PositionBias
) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
    (height, width), radius = grid, window_size // 2
    table, row_index, column_index = pool_bias
    pool_width = column_index.shape[1]

    def modified(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        i, j = query // width, query % width
        pooled = key >= height * width
        number = (key // width - i + radius) * window_size + key % width - j + radius
        near = window_bias[head, number.clamp(0, window_size**2 - 1)]  # what is clamped is masked
        place = (key - height * width).clamp(min=0)
        far = table[head, row_index[i, place // pool_width], column_index[j, place % pool_width]]
        return score + torch.where(pooled, far, near)

    return modified


def aggregated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    *,
    window_size: int,
    scale: Tensor,
    query_embedding: Tensor,
    window_bias: Tensor,
    pool_bias: PositionBias,
    positional_tokens: Tensor,
    positional_bias: Tensor,
    block_mask: BlockMask,
) -> Tensor:
    """``foveal.ops.aggregated_attention``, length-scaled and normalised. Fast where it is compiled."""
    grid, keys = (q.shape[1], q.shape[2]), k_pool.shape[1] * k_pool.shape[2]
    unit, k, k_pool = (F.normalize(x, dim=-1) for x in (q, k, k_pool))
    length = reference.inside_map(grid, window_size, q.device).sum(-1) + keys
    factor = scale[:, None] * length.log()[:, :, None, None]
    query = ((unit + query_embedding) * factor).to(q.dtype).flatten(1, 2)
    near_and_far = (torch.cat([x.flatten(1, 2), y.flatten(1, 2)], dim=1) for x, y in ((k, k_pool), (v, v_pool)))
    query, key, value = (x.transpose(1, 2) for x in (query, *near_and_far))
    out = flex_attention(
        query,
        key,
        value,
        score_mod=_add_biases(grid, window_size, window_bias, pool_bias),
        block_mask=block_mask,
        scale=1.0,
    )
    weights = torch.einsum("bhwnd,ndc->bhwnc", unit, positional_tokens.to(unit.dtype)) + positional_bias
    return out.transpose(1, 2).unflatten(1, grid) + ops.window_sum(weights.to(v.dtype), v, window_size)
