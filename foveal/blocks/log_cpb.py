"""Log-CPB: a position bias computed from log-spaced relative coordinates, for a map of any size."""

import math
from functools import partial

import torch
from torch import Tensor, nn

from foveal.blocks._caching import KeptByContent, cached_by_size, may_keep_tensors
from foveal.blocks._checks import Grid, check_positive
from foveal.blocks._initialization import init_linear
from foveal.blocks._module import MapModule
from foveal.blocks._plain import are_plain, weights_of
from foveal.ops import PositionBias, current_backend, log_cpb_table, reference
from foveal.ops.tracing import is_exporting

_RANGE = 8.0  # relative coordinates are stretched to [-8, 8] at the pre-training size, then log-compressed to [-1, 1]


def log_spaced(offset: Tensor, pretrain_length: int) -> Tensor:
    """Coordinates of relative offsets, in cells, along an axis that had ``pretrain_length`` cells at pre-training."""
    if pretrain_length == 1:
        return torch.zeros_like(offset)
    relative = offset * (_RANGE / (pretrain_length - 1))
    return relative.sign() * torch.log2(1 + relative.abs()) / math.log2(_RANGE)


relative_offsets = cached_by_size(reference.relative_offsets)


class LogCPB(MapModule):
    """A position bias from an MLP over log-spaced relative coordinates (equation 11).

    The MLP, 2 -> hidden -> heads with ReLU, sees each distinct pair of a row and a column offset once. In eval mode,
    where nobody differentiates or has altered its layers, the bias of the last few sizes is kept, with the weights
    that it was made of.

    Args:
        num_heads: heads, one bias each.
        hidden_dim: width of the hidden layer.

    Example:
        >>> bias = LogCPB(num_heads=3)((56, 56), (7, 7), pretrain_grid=(56, 56))
        >>> bias.dense().shape
        torch.Size([3, 3136, 49])
    """

    def __init__(self, num_heads: int, *, hidden_dim: int = 512, device=None, dtype=None):
        super().__init__()
        check_positive("num_heads", num_heads)
        check_positive("hidden_dim", hidden_dim)
        self.fc1 = nn.Linear(2, hidden_dim, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden_dim, num_heads, device=device, dtype=dtype)
        self._kept = KeptByContent()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init_linear(self.fc1)
        init_linear(self.fc2)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters()}

    def forward(
        self, query_grid: Grid, key_grid: Grid, pretrain_grid: Grid, *, like: Tensor | None = None
    ) -> PositionBias:
        """The bias of a query grid (H, W) against a pooled key grid (Hp, Wp), both in cells.

        Args:
            query_grid: rows and columns of the queries.
            key_grid: rows and columns of the keys, pooled from the query grid.
            pretrain_grid: the query grid at pre-training, which normalises the coordinates.
            like: a tensor on the device of the result; None takes that of the weights.
        """
        like = next(self.parameters()) if like is None else like
        bias = partial(self._bias, query_grid, key_grid, pretrain_grid, like)
        if not self._may_keep(like):
            return bias()
        key = query_grid, key_grid, pretrain_grid, current_backend()
        return self._kept.get(key, weights_of(self.fc1, self.fc2), bias)

    def _bias(self, query_grid: Grid, key_grid: Grid, pretrain_grid: Grid, like: Tensor) -> PositionBias:
        (rows, row_index), (columns, column_index) = (
            _offsets(queries, keys, like) for queries, keys in zip(query_grid, key_grid, strict=True)
        )
        return PositionBias(self._table(rows, columns, pretrain_grid, like), row_index, column_index)

    def _table(self, rows: Tensor, columns: Tensor, pretrain_grid: Grid, like: Tensor) -> Tensor:
        """``fc2(relu(fc1(coordinates)))`` of every pair of a row and a column offset: ``(heads, Th, Tw)``."""
        dtype = next((p.dtype for p in self.parameters() if p.is_floating_point()), torch.float32)
        rows, columns = (
            log_spaced(offsets.to(torch.promote_types(dtype, torch.float32)), length)
            for offsets, length in zip((rows, columns), pretrain_grid, strict=True)
        )
        if self._may_be_read(like):
            return log_cpb_table(rows, columns, *weights_of(self.fc1, self.fc2))
        pairs = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)
        return reference.at_least_float32(self.fc2(self.fc1(pairs.to(dtype)).relu())).permute(2, 0, 1)

    def _may_be_read(self, like: Tensor) -> bool:
        """Whether the bias is a function of the layers' weights alone."""
        return are_plain(like, self.fc1, self.fc2) and self.fc1.bias is not None and self.fc2.bias is not None

    def _may_keep(self, like: Tensor) -> bool:
        """Whether the bias is a function of weights that nobody differentiates."""
        if self.training or like.is_meta or not may_keep_tensors() or not self._may_be_read(like):
            return False
        return not (torch.is_grad_enabled() and any(p.requires_grad for p in weights_of(self.fc1, self.fc2)))


def window_bias(log_cpb: nn.Module, window_size: int, pretrain_grid: Grid, *, like: Tensor | None = None) -> Tensor:
    """The bias of the cells of a sliding window, row-major: ``(heads, k * k)``.

    On a map of the window's size the offsets go from 1 - k to k - 1; those of the window are the middle ones.
    """
    grid, radius = (window_size, window_size), window_size // 2
    table = log_cpb(grid, grid, pretrain_grid, like=like).table
    return table[:, radius : radius + window_size, radius : radius + window_size].flatten(1)


def _offsets(queries: int, keys: int, like: Tensor) -> tuple[Tensor, ...]:
    if torch.compiler.is_compiling() and not is_exporting():
        return torch.ops.foveal.relative_offsets(like.detach(), queries, keys)
    return relative_offsets(queries, keys, like.device)
