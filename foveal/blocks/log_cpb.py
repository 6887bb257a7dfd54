"""Log-CPB: a position bias computed from log-spaced relative coordinates, for a map of any size."""

from typing import Any

import torch
from torch import Tensor, nn

from foveal.blocks._caching import WeightedCache, cached_by_size
from foveal.blocks._checks import Grid, check_positive
from foveal.blocks._initialization import init_linear
from foveal.blocks.replaced import may_take_apart
from foveal.ops import PositionBias, log_cpb_table, reference
from foveal.ops.tracing import is_exporting

_RANGE = 8.0  # relative coordinates are stretched to [-8, 8] at the pre-training size, then log-compressed to [-1, 1]


def log_spaced(offset: Tensor, pretrain_length: int) -> Tensor:
    """Coordinates of relative offsets, in cells, along an axis that had ``pretrain_length`` cells at pre-training."""
    if pretrain_length == 1:
        return torch.zeros_like(offset)
    relative = offset * (_RANGE / (pretrain_length - 1))
    return relative.sign() * torch.log2(1 + relative.abs()) / 3  # log2(8)


relative_offsets = cached_by_size(reference.relative_offsets)


class LogCPB(nn.Module):
    """A position bias from an MLP over log-spaced relative coordinates (equation 11).

    The MLP, 2 -> hidden -> heads with ReLU, sees each distinct pair of a row and a column offset once. In eval mode the
    bias is kept for the last few sizes while the weights stand still (writes through ``.data`` go unnoticed: follow
    them with ``.train().eval()``).

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
        self._cache = WeightedCache()
        self.register_load_state_dict_post_hook(_forget)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init_linear(self.fc1)
        init_linear(self.fc2)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters()}

    def forward(self, query_grid: Grid, key_grid: Grid, pretrain_grid: Grid) -> PositionBias:
        """The bias of a query grid (H, W) against a pooled key grid (Hp, Wp), both in cells.

        Args:
            query_grid: rows and columns of the queries.
            key_grid: rows and columns of the keys, pooled from the query grid.
            pretrain_grid: the query grid at pre-training, which normalises the coordinates.
        """
        key = (*query_grid, *key_grid, *pretrain_grid)
        return self._cache.get(self, key, lambda: self._bias(query_grid, key_grid, pretrain_grid))

    def window(self, window_size: int, pretrain_grid: Grid) -> Tensor:
        """The bias of the cells of a sliding window, row-major: ``(heads, k * k)``."""
        radius = window_size // 2
        offsets = torch.arange(-radius, radius + 1, device=self._like.device, dtype=torch.float32)
        return self._table(offsets, offsets, pretrain_grid).flatten(1)

    def _bias(self, query_grid: Grid, key_grid: Grid, pretrain_grid: Grid) -> PositionBias:
        (rows, row_index), (columns, column_index) = map(self._offsets, query_grid, key_grid)
        return PositionBias(self._table(rows, columns, pretrain_grid), row_index, column_index)

    def _offsets(self, queries: int, keys: int) -> tuple[Tensor, Tensor]:
        if torch.compiler.is_compiling() and not is_exporting():
            return torch.ops.foveal.relative_offsets(self._like, queries, keys)
        return relative_offsets(queries, keys, self._like.device)

    def _table(self, rows: Tensor, columns: Tensor, pretrain_grid: Grid) -> Tensor:
        dtype = torch.promote_types(self._like.dtype, torch.float32)
        rows, columns = (
            log_spaced(offsets.to(dtype), length)
            for offsets, length in zip((rows, columns), pretrain_grid, strict=True)
        )
        if not (may_take_apart(self.fc1) and may_take_apart(self.fc2)):
            pairs = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)
            return self.fc2(self.fc1(pairs).relu()).permute(2, 0, 1)
        return log_cpb_table(rows, columns, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)

    @property
    def _like(self) -> Tensor:
        """A tensor on the device and of the dtype of the weights; a quantised layer may hide its own."""
        weight = self.fc1.weight
        return weight.detach() if isinstance(weight, Tensor) else torch.empty(0)

    def _apply(self, fn, recurse=True):
        self._cache.clear()
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True):
        self._cache.clear()
        return super().train(mode)


def _forget(module: LogCPB, incompatible_keys: Any) -> None:
    """A named function, unlike a lambda, lets the module be pickled."""
    module._cache.clear()
