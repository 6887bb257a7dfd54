"""Checks that blocks make at their door."""

from collections.abc import Sequence
from typing import overload

from torch import Tensor

from foveal.ops._checks import check_grid
from foveal.ops.tracing import shape_of

Grid = tuple[int, int]


def check_map(x: Tensor, dim: int) -> None:
    """Raise unless ``x`` is a channels-last map ``(B, H, W, dim)`` with at least one cell."""
    shape = shape_of(x)
    if len(shape) != 4 or shape[-1] != dim:
        raise ValueError(f"x must have shape (B, H, W, C) with C = {dim}, channels last, got {tuple(shape)}")
    if shape[1] < 1 or shape[2] < 1:
        raise ValueError(f"x must have at least one row and one column, got {tuple(shape)}")


def grid_of_map(x: Tensor) -> Grid:
    """The rows and columns of a map ``(B, H, W, C)``."""
    _, height, width, _ = shape_of(x)
    return height, width


def check_heads(dim: int, num_heads: int) -> None:
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"num_heads must divide dim = {dim}, got {num_heads}")


def check_positive(name: str, value: int) -> None:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")


def check_probability(name: str, value: float) -> None:
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name} must be in [0, 1), got {value!r}")


@overload
def to_grid(name: str, grid: None) -> None: ...
@overload
def to_grid(name: str, grid: int | Sequence[int]) -> Grid: ...
def to_grid(name: str, grid: int | Sequence[int] | None) -> Grid | None:
    """A grid (rows, columns); an integer means a square one."""
    if grid is None:
        return None
    if isinstance(grid, int):
        grid = (grid, grid)
    check_grid(name, grid)
    return grid[0], grid[1]
