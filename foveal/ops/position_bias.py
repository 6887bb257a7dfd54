"""The position bias of a query grid against a key grid, kept factorised into rows and columns."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from foveal.ops.tracing import shape_of

Grid = tuple[int, int]


class PositionBias(NamedTuple):
    """A bias per head, query cell and key cell that is looked up by row and by column.

    A relative position separates into a row offset and a column offset, so the bias of query ``(i, j)`` against key
    ``(a, b)`` is ``table[:, row_index[i, a], column_index[j, b]]``. The dense tensor over all pairs is never needed.

    Attributes:
        table: ``(heads, Th, Tw)``, floating point.
        row_index: ``(H, Hp)``, int64 in ``[0, Th)``. Attention raises an IndexError on the CPU where it is not; on a
            GPU nobody looks.
        column_index: ``(W, Wp)``, int64 in ``[0, Tw)``, likewise.
    """

    table: Tensor
    row_index: Tensor
    column_index: Tensor

    @property
    def query_grid(self) -> Grid:
        return shape_of(self.row_index)[0], shape_of(self.column_index)[0]

    @property
    def key_grid(self) -> Grid:
        return shape_of(self.row_index)[1], shape_of(self.column_index)[1]

    def dense(self) -> Tensor:
        """The bias of every pair, ``(heads, H * W, Hp * Wp)``: quadratic in the size of the map."""
        bias = self.table[:, self.row_index[:, None, :, None], self.column_index[None, :, None, :]]
        return bias.flatten(3, 4).flatten(1, 2)

    @classmethod
    def from_dense(cls, bias: Tensor) -> "PositionBias":
        """Wrap a bias ``(heads, H, W, Hp, Wp)`` that has no structure: every pair is an entry of its own."""
        heads, height, width, key_height, key_width = shape_of(bias)
        table = bias.transpose(2, 3).reshape(heads, height * key_height, width * key_width)
        rows = torch.arange(height * key_height, device=bias.device).view(height, key_height)
        columns = torch.arange(width * key_width, device=bias.device).view(width, key_width)
        return cls(table, rows, columns)

    @classmethod
    def per_key(cls, bias: Tensor, query_grid: Grid) -> "PositionBias":
        """Wrap a bias ``(heads, Hp, Wp)`` that depends on the key alone."""
        _, key_height, key_width = shape_of(bias)
        rows = torch.arange(key_height, device=bias.device).expand(query_grid[0], -1)
        columns = torch.arange(key_width, device=bias.device).expand(query_grid[1], -1)
        return cls(bias, rows.contiguous(), columns.contiguous())

    def interpolate(self, query_grid: Grid, key_grid: Grid) -> "PositionBias":
        """Resample bilinearly to other grids, first over the keys, then over the queries. The result is dense."""
        # Not by the properties, which PyTorch 2.10 cannot trace.
        (height, key_height), (width, key_width) = shape_of(self.row_index), shape_of(self.column_index)
        same = zip((*query_grid, *key_grid), (height, width, key_height, key_width), strict=True)
        if all(statically_known_true(wanted == has) for wanted, has in same):  # no guard on sizes that are left open
            return self
        bias = self.dense().unflatten(2, (key_height, key_width))
        bias = F.interpolate(bias, key_grid, mode="bilinear", align_corners=False)
        bias = bias.flatten(2).transpose(1, 2).unflatten(2, (height, width))
        bias = F.interpolate(bias, query_grid, mode="bilinear", align_corners=False)
        bias = bias.flatten(2).transpose(1, 2)
        return PositionBias.from_dense(bias.reshape(-1, *query_grid, *key_grid))
