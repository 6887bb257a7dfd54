"""Multiply-adds of the paper's blocks in closed form (equations 15 and 16), for one image.

They count matrix products and convolutions, as the paper's equations do: no norms, no softmax, no log-CPB.
"""

from collections.abc import Sequence
from math import prod

from foveal.blocks._checks import check_positive, to_grid
from foveal.ops._checks import check_window_size

Sides = int | Sequence[int]


def pixel_focused_attention(grid: Sides, pool_grid: Sides, dim: int, *, window_size: int = 3) -> int:
    """``5 HW C^2 + 2 HpWp C^2 + 2 HW HpWp C + 2 HW k^2 C`` (equation 15).

    In linear mode the pooled grid is fixed, and the whole is linear in HW.

    Args:
        grid: rows and columns (H, W) of the map, in cells.
        pool_grid: those of the pooled map, (Hp, Wp).
        dim: channels C.
        window_size: side k of the window.
    """
    check_positive("dim", dim)
    check_window_size(window_size)
    cells, pooled = prod(to_grid("grid", grid)), prod(to_grid("pool_grid", pool_grid))
    projections = 5 * cells * dim**2 + 2 * pooled * dim**2
    return projections + 2 * cells * pooled * dim + 2 * cells * window_size**2 * dim


def aggregated_attention(grid: Sides, pool_grid: Sides, dim: int, *, window_size: int = 3) -> int:
    """Those of pixel-focused attention and ``HW k^2 C`` for the positional attention (equation 16)."""
    pixel_focused = pixel_focused_attention(grid, pool_grid, dim, window_size=window_size)
    return pixel_focused + prod(to_grid("grid", grid)) * window_size**2 * dim


def conv_glu(grid: Sides, dim: int, hidden_dim: int, *, kernel_size: int = 3) -> int:
    """``3 HW C hidden + HW hidden k^2``: with hidden = 2/3 R C it is the paper's ``2 R HW C^2 + 2/3 R HW C k^2``.

    Args:
        grid: rows and columns (H, W) of the map, in cells.
        dim: channels C.
        hidden_dim: width of the gate and of the value.
        kernel_size: side k of the depthwise convolution.
    """
    for name, value in (("dim", dim), ("hidden_dim", hidden_dim), ("kernel_size", kernel_size)):
        check_positive(name, value)
    return prod(to_grid("grid", grid)) * hidden_dim * (3 * dim + kernel_size**2)
