"""Every op of foveal in plain PyTorch: the specification, the tests' oracle, and what runs where nothing faster fits.

Sizes: B images, an H x W map, heads of d channels, an Hp x Wp pooled map, a k x k window. Half types are computed in
float32 and returned in their own type; float64 stays float64.
"""

import math
from collections.abc import Callable, Sequence
from functools import reduce, wraps
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from foveal.ops._checks import check_window_size
from foveal.ops.position_bias import Grid, PositionBias
from foveal.ops.tracing import is_exporting, shape_of

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "identity": lambda x: x,
}
_SHORTEST = 1e-12  # of the vectors that have a direction


def at_least_float32(x: Tensor) -> Tensor:
    """Half types become float32; float32 and float64 stay."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def unit(x: Tensor) -> Tensor:
    """``x / |x|`` over the last axis, in at least float32; a vector shorter than 1e-12 is zero and has no gradient."""
    x = at_least_float32(x)
    squares = x.square().sum(dim=-1, keepdim=True)
    return x / squares.masked_fill(squares < _SHORTEST**2, math.inf).sqrt()


@torch.compiler.assume_constant_result
def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def _without_autocast(function: Callable) -> Callable:
    """Keep autocast from lowering the precision that the definition asks for."""

    @wraps(function)
    def wrapper(x: Tensor, *args, **kwargs):
        device_type = x.device.type
        if not _has_autocast(device_type) or not torch.is_autocast_enabled(device_type):
            return function(x, *args, **kwargs)
        with torch.autocast(device_type, enabled=False):
            return function(x, *args, **kwargs)

    return wrapper


def shifted(x: Tensor, window_size: int) -> list[Tensor]:
    """``(B, H, W, *)`` as each cell of the window sees it: k * k maps of that shape, row-major, zeros from outside."""
    check_window_size(window_size)
    height, width = shape_of(x)[1:3]
    radius = window_size // 2
    padded = F.pad(x, (0, 0) * (x.dim() - 3) + (radius,) * 4)
    offsets = [(i, j) for i in range(window_size) for j in range(window_size)]
    return [padded[:, i : i + height, j : j + width] for i, j in offsets]


def windows(x: Tensor, window_size: int) -> Tensor:
    """The k * k cells around every cell, row-major, zeros outside the map: ``(B, H, W, *) -> (B, H, W, *, k * k)``."""
    return torch.stack(shifted(x, window_size), dim=-1)


def inside_map(grid: Sequence[int], window_size: int, device: torch.device) -> Tensor:
    """Which cells of every window lie inside the map: bool, ``(H, W, k * k)``."""
    check_window_size(window_size)
    radius = window_size // 2
    offset = torch.arange(-radius, radius + 1, device=device)
    rows, columns = ((torch.arange(side, device=device)[:, None] + offset) for side in grid)
    rows, columns = (((x >= 0).logical_and(x < side)) for x, side in zip((rows, columns), grid, strict=True))
    return rows[:, None, :, None].logical_and(columns[None, :, None, :]).flatten(2)


@_without_autocast
def window_scores(q: Tensor, k: Tensor, window_size: int) -> Tensor:
    """``q . k`` over the sliding window: ``(B, H, W, heads, d)`` twice to ``(B, H, W, heads, k * k)``, -inf outside."""
    query, key = at_least_float32(q), at_least_float32(k)
    if is_exporting():  # sums that a compiler fuses, not a product of tiny matrices for every cell
        scores = torch.stack([(query * near).sum(-1) for near in shifted(key, window_size)], dim=-1)
    else:
        scores = (query.unsqueeze(-2) @ windows(key, window_size)).squeeze(-2)
    inside = inside_map(shape_of(q)[1:3], window_size, q.device)
    return scores.masked_fill(inside[:, :, None].logical_not(), float("-inf")).to(q.dtype)


@_without_autocast
def window_sum(weights: Tensor, v: Tensor, window_size: int) -> Tensor:
    """``weights . v`` over the sliding window: ``(B, H, W, heads, k * k)``, ``(B, H, W, heads, d)`` to the latter.

    Cells outside the map add nothing, whatever their weights.
    """
    inside = inside_map(shape_of(v)[1:3], window_size, v.device)
    return _window_sum(weights.masked_fill(inside[:, :, None].logical_not(), 0.0), v, window_size)


def _window_sum(weights: Tensor, v: Tensor, window_size: int) -> Tensor:
    """The sum over cells that outside the map hold zeros."""
    weight, value = at_least_float32(weights), at_least_float32(v)
    if is_exporting():
        terms = (weight[..., i : i + 1] * near for i, near in enumerate(shifted(value, window_size)))
        return reduce(torch.add, terms).to(v.dtype)
    return (windows(value, window_size) @ weight.unsqueeze(-1)).squeeze(-1).to(v.dtype)


def aggregated_attention(q: Tensor, *args, **kwargs) -> Tensor:
    """Window and pooled keys in one softmax (equations 1-5 and 10-14); see :func:`aggregated_attention_weights`."""
    return aggregated_attention_with_lse(q, *args, **kwargs)[0]


@_without_autocast
def aggregated_attention_with_lse(
    q: Tensor, k: Tensor, v: Tensor, k_pool: Tensor, v_pool: Tensor, *parameters_and_options
) -> tuple[Tensor, Tensor]:
    """The attention's output ``(B, H, W, heads, d)`` and the log-sum-exp of its logits ``(B, H, W, heads)``.

    ``parameters_and_options`` are those of :func:`aggregated_attention_weights`.
    """
    near, far, positional, lse = aggregated_attention_weights(q, k, k_pool, *parameters_and_options)
    v, v_pool = at_least_float32(v), at_least_float32(v_pool)
    near = near if positional is None else near + positional
    out = _window_sum(near, v, math.isqrt(shape_of(near)[-1])) + torch.einsum(
        "bhwnp,bpnd->bhwnd", far, v_pool.flatten(1, 2)
    )
    return out.to(q.dtype), lse


@_without_autocast
def aggregated_attention_weights(
    q: Tensor,
    k: Tensor,
    k_pool: Tensor,
    scale: Tensor,
    query_embedding: Tensor | None,
    window_bias: Tensor | None,
    pool_bias: Tensor | None,
    pool_rows: Tensor | None,
    pool_columns: Tensor | None,
    positional_tokens: Tensor | None,
    positional_bias: Tensor | None,
    window_size: int,
    length_scaled: bool,
    normalize: bool,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """What the values are multiplied with.

    Returns:
        the softmax's weights of the window ``(B, H, W, heads, k * k)`` and of the pooled map
        ``(B, H, W, heads, Hp * Wp)``; what positional attention adds to the window's, None without it; the log-sum-exp
        of the logits ``(B, H, W, heads)``.
    """
    q, k, k_pool = map(unit if normalize else at_least_float32, (q, k, k_pool))
    scale = scale.to(q.dtype)
    query_embedding, window_bias, pool_bias, positional_tokens, positional_bias = (
        None if x is None else x.to(q.dtype)
        for x in (query_embedding, window_bias, pool_bias, positional_tokens, positional_bias)
    )
    (_, *grid, _, _), (_, *key_grid, _, _) = shape_of(q), shape_of(k_pool)

    query = (q if query_embedding is None else q + query_embedding) * scale[:, None]
    if length_scaled:
        length = inside_map(grid, window_size, q.device).sum(-1) + key_grid[0] * key_grid[1]
        query = query * length.to(query.dtype).log()[:, :, None, None]

    near = window_scores(query, k, window_size)
    if window_bias is not None:
        near = near + window_bias
    far = torch.einsum("bhwnd,bpnd->bhwnp", query, k_pool.flatten(1, 2))
    if pool_bias is not None and pool_rows is not None and pool_columns is not None:
        bias = PositionBias(pool_bias, pool_rows, pool_columns).dense()
        far = far + bias.unflatten(1, grid).permute(1, 2, 0, 3)

    logits = torch.cat([near, far], dim=-1)
    weights = F.dropout(logits.softmax(dim=-1), dropout_p) if dropout_p else logits.softmax(dim=-1)
    near, far = weights.split([window_size**2, key_grid[0] * key_grid[1]], dim=-1)
    positional = None
    if positional_tokens is not None:
        positional = torch.einsum("bhwnd,ndc->bhwnc", q, positional_tokens)
    if positional_bias is not None:
        positional = positional_bias.expand(near.shape) if positional is None else positional + positional_bias
    return near, far, positional, logits.logsumexp(dim=-1)


@_without_autocast
def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float | None, dropout_p: float
) -> Tensor:
    """``softmax(scale q k^T + bias) v``: ``(B, heads, N, d)``, twice ``(B, heads, M, d)`` to ``(B, heads, N, d)``."""
    query, key, value = map(at_least_float32, (q, k, v))
    logits = query * (q.shape[-1] ** -0.5 if scale is None else scale) @ key.transpose(-2, -1)
    weights = (logits if bias is None else logits + bias).softmax(dim=-1)
    return (F.dropout(weights, dropout_p) @ value).to(v.dtype)


def depthwise_convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A k x k depthwise convolution with zero padding over ``(B, H, W, C)``; weight ``(C, 1, k, k)``, bias ``(C,)``."""
    channels, _, size, _ = shape_of(weight)
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if 0 in shape_of(x):  # which conv2d refuses: nothing, and gradients of zero
        return x * weight.sum((1, 2, 3)) + (0.0 if bias is None else bias)
    x = x.permute(0, 3, 1, 2)
    return F.conv2d(x, weight, bias, padding=size // 2, groups=channels).permute(0, 2, 3, 1)


@_without_autocast
def depthwise_gate(x: Tensor, weight: Tensor, bias: Tensor | None, act: str = "gelu") -> Tensor:
    """``act(dwconv(gate) + bias) * value``, ``x = [gate | value]``: ``(B, H, W, 2C) -> (B, H, W, C)`` (equation 19)."""
    gate, value = at_least_float32(x).chunk(2, dim=-1)
    return (ACTIVATIONS[act](depthwise_convolution(gate, weight, bias)) * value).to(x.dtype)


def biased(x: Tensor, bias: Tensor) -> Tensor:
    """``x + bias`` in the dtype of x."""
    return (x + bias).to(x.dtype)


def add_branch(x: Tensor, y: Tensor, y_bias: Tensor | None) -> Tensor:
    """``x + (y + y_bias)``, with a bias computed in float32 for half types; the dtype is that of ``x + y``."""
    if y_bias is None:
        return x + y
    return (x + (at_least_float32(y) + y_bias)).to(torch.promote_types(x.dtype, y.dtype))


def add_layer_norm(
    x: Tensor, y: Tensor | None, y_bias: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """``x + (y + y_bias)`` and its LayerNorm over channels: ``(*, C)``. PyTorch's own, under autocast too."""
    total = x if y is None else add_branch(x, y, y_bias)
    return total, F.layer_norm(total, total.shape[-1:], weight, bias, eps)


@_without_autocast
def activate_and_pool(x: Tensor, grid: Grid, act: str = "gelu") -> Tensor:
    """Activation, then adaptive average pooling: ``(B, H, W, C) -> (B, Hp, Wp, C)`` (equation 5, without its norm)."""
    activated = ACTIVATIONS[act](at_least_float32(x))
    if is_exporting():  # other runtimes pool a map of unknown size no other way
        rows, columns = (averages(shape_of(x)[1 + i], grid[i], activated) for i in (0, 1))
        return torch.einsum("ah,bhwc,ew->baec", rows, activated, columns).to(x.dtype)
    if shape_of(x)[-1] == 0:  # of which adaptive pooling has no gradient
        return activated[:, :1, :1].expand(-1, *grid, -1).to(x.dtype)
    pooled = F.adaptive_avg_pool2d(activated.permute(0, 3, 1, 2), (grid[0], grid[1]))
    return pooled.permute(0, 2, 3, 1).to(x.dtype)


def pooling_bins(cells: int, bins: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The first and the last cell of every bin of adaptive pooling along one axis: ``(bins,)`` each, int64."""
    index = torch.arange(bins, device=device)
    return index * cells // bins, ((index + 1) * cells + bins - 1) // bins - 1


def averages(cells: int, bins: int, like: Tensor) -> Tensor:
    """Adaptive average pooling along one axis as a matrix ``(bins, cells)``, in the dtype and on the device of like."""
    first, last = pooling_bins(cells, bins, like.device)
    cell = torch.arange(cells, device=like.device)
    inside = (cell >= first[:, None]).logical_and(cell <= last[:, None])
    return inside.to(like.dtype) / (last - first + 1)[:, None]


@_without_autocast
def log_cpb_table(
    rows: Tensor, columns: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor
) -> Tensor:
    """The log-CPB MLP on every pair of a row and a column coordinate: ``(Th,)``, ``(Tw,)`` to ``(heads, Th, Tw)``."""
    weight2 = at_least_float32(weight2)
    rows, columns, weight1, bias1, bias2 = (x.to(weight2.dtype) for x in (rows, columns, weight1, bias1, bias2))
    hidden = (rows[:, None, None] * weight1[:, 0] + bias1) + columns[:, None] * weight1[:, 1]
    return F.linear(hidden.relu(), weight2, bias2).permute(2, 0, 1)


def relative_offsets(queries: int, keys: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """All offsets between the query cells and the pooled key cells of one axis, and which pair has which.

    Key a is centred on its pooling bin, the cells floor(a H / Hp) to ceil((a + 1) H / Hp) - 1. Twice an offset,
    2 i - (first + last), is an integer, of one parity where the sizes divide: so offsets are listed without sorting.

    Returns:
        offsets ``(T,)`` in cells, float32, ascending by 1 or 1/2; index ``(H, Hp)`` into them, int64.
    """
    first, last = pooling_bins(queries, keys, device)
    twice = 2 * torch.arange(queries, device=device)[:, None] - (first + last)
    if not (isinstance(queries, int) and isinstance(keys, int)):  # sizes left open by an export: leave it to the graph
        lowest = twice[0, -1]
        step = 2 - ((twice - lowest) % 2).amax((0, 1))
        index = (twice - lowest) // step
        offsets = torch.arange(index[-1, 0].item() + 1, device=device) * step + lowest
        return offsets.float() / 2, index
    lowest, highest, step = offset_range(queries, keys)
    offsets = torch.arange(lowest, highest + 1, step, device=device, dtype=torch.float32) / 2
    return offsets, (twice - lowest) // step


def offset_range(queries: int, keys: int) -> tuple[int, int, int]:
    """The lowest and the highest of twice the offsets, and the step between them."""
    lowest = -((keys - 1) * queries // keys + queries - 1)
    highest = 2 * (queries - 1) - ((queries + keys - 1) // keys - 1)
    step = 2 - torch.sym_min(queries % keys, 1)  # no branch, which would be a guard of a graph
    return lowest, highest, cast("int", step)
