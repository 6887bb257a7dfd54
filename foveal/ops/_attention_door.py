"""What attention checks of its arguments: that they fit each other, and that an index lies within its table."""

import torch
from torch import Tensor

from foveal.ops._checks import (
    check_dim,
    check_index,
    check_parameter,
    check_same_device,
    check_same_dtype,
    check_shape,
    check_window_size,
)
from foveal.ops.backend import circumstances
from foveal.ops.position_bias import PositionBias
from foveal.ops.tracing import shape_of

_MAP, _POOL = "(B, H, W, heads, d)", "(B, Hp, Wp, heads, d)"


def check_arguments(
    window_size: int, maps: dict[str, Tensor], parameters: dict[str, Tensor | None], pool_bias: PositionBias | None
) -> None:
    """Raise unless the arguments fit each other."""
    check_window_size(window_size)
    q, k_pool, cells = maps["q"], maps["k_pool"], window_size**2
    check_dim("q", q, _MAP)
    check_dim("k_pool", k_pool, _POOL)
    batch, height, width, heads, dim = shape_of(q)
    key_grid = shape_of(k_pool)[1:3]
    for name, x in maps.items():
        pooled = name.endswith("_pool")
        check_shape(name, x, (batch, *key_grid, heads, dim) if pooled else shape_of(q), _POOL if pooled else _MAP)
    check_same_dtype(**maps)
    shapes = {
        "scale": ((heads,), "(heads,)"),
        "query_embedding": ((heads, dim), "(heads, d)"),
        "window_bias": ((heads, cells), "(heads, k * k)"),
        "positional_tokens": ((heads, dim, cells), "(heads, d, k * k)"),
        "positional_bias": ((heads, cells), "(heads, k * k)"),
        "input_bias": ((3, heads, dim), "(3, heads, d)"),
    }
    for name, parameter in parameters.items():
        check_parameter(name, parameter, *shapes[name])
    index = {}
    if pool_bias is not None:
        table, rows, columns = pool_bias
        check_dim("pool_bias.table", table, "(heads, Th, Tw)")
        check_parameter("pool_bias.table", table, (heads, *shape_of(table)[1:]), "(heads, Th, Tw)")
        check_index("pool_bias.row_index", rows, (height, key_grid[0]), "(H, Hp)")
        check_index("pool_bias.column_index", columns, (width, key_grid[1]), "(W, Wp)")
        index = {"pool_bias.table": table, "pool_bias.row_index": rows, "pool_bias.column_index": columns}
    check_same_device(q, **{name: x for name, x in maps.items() if name != "q"}, **parameters, **index)


def check_entries(bias: PositionBias | None) -> None:
    """Raise what kernels raise of an index outside of the table, where looking breaks no graph and stalls no GPU."""
    if bias is None or bias.table.device.type != "cpu" or torch.compiler.is_compiling() or circumstances(bias.table):
        return
    for side, index in zip(("row", "column"), (bias.row_index, bias.column_index), strict=True):
        size = shape_of(bias.table)[1 if side == "row" else 2]
        if index.numel() and not 0 <= index.min() <= index.max() < size:
            raise IndexError(f"pool_bias.{side}_index must lie in [0, {size}), got {index.min()} to {index.max()}")
