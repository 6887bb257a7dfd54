"""Blocks in networks whose maps are rows of tokens, ``(B, N, C)``, with or without prefix tokens before the cells."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from foveal.blocks._checks import Grid, to_grid
from foveal.blocks.layouts.adapter import Adapter
from foveal.blocks.layouts.grid import HasGrid
from foveal.ops.tracing import integers, shape_of


class Tokens(Adapter):
    """A block over tokens ``(B, P + H * W, C)``: P prefix tokens (class, registers), then the cells row by row.

    Prefix tokens have no neighbours: they take the block's ``pointwise`` part, everything but its convolution. A hook
    on the block itself sees the cells alone; one on a layer in it sees both.

    Args:
        block: any module ``(B, H, W, C) -> (B, H, W, C')``; with prefix tokens it needs a method ``pointwise``.
        grid: the grid (H, W), fixed, or an object whose ``grid_size`` tells it: :func:`grid_of` a patch embedding, or
            a :class:`CarriedGrid`.
        num_prefix_tokens: P.

    Example:
        >>> Tokens(ConvGLU(384), grid=14, num_prefix_tokens=1)(torch.randn(2, 197, 384)).shape
        torch.Size([2, 197, 384])
    """

    def __init__(self, block: nn.Module, grid: int | Sequence[int] | HasGrid, num_prefix_tokens: int = 0):
        super().__init__(block)
        if not isinstance(num_prefix_tokens, int) or num_prefix_tokens < 0:
            raise ValueError(f"num_prefix_tokens must be a non-negative integer, got {num_prefix_tokens!r}")
        if num_prefix_tokens and not callable(getattr(block, "pointwise", None)):
            raise ValueError(
                f"num_prefix_tokens must be 0 for {type(block).__name__}, which has no pointwise part that prefix "
                f"tokens could take, got {num_prefix_tokens}"
            )
        self.grid = grid if hasattr(grid, "grid_size") else to_grid("grid", grid)
        self.num_prefix_tokens = num_prefix_tokens

    @property
    def grid_size(self) -> Grid | None:
        """The grid of the tokens to come, as far as it is known."""
        return self.grid if isinstance(self.grid, tuple) else self.grid.grid_size

    def forward(self, x: Tensor) -> Tensor:
        grid = self.grid_size
        if grid is None:
            raise RuntimeError("the grid of the tokens is not known yet: no map has passed where it is noted")
        prefix = self.num_prefix_tokens
        if prefix == 0:
            return _through_map(self.block, x, grid)
        out = _through_map(self.block, x[:, prefix:], grid)
        return torch.cat((self.block.pointwise(x[:, :prefix]), out), dim=1)

    def extra_repr(self) -> str:
        grid = self.grid if isinstance(self.grid, tuple) else type(self.grid).__name__
        return f"grid={grid}, num_prefix_tokens={self.num_prefix_tokens}"


class TokenMixer(Tokens):
    """Tokens where timm's ViT has its attention, which is called with a mask."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if attn_mask is not None or is_causal:
            raise ValueError(f"{type(self.block).__name__} mixes whole maps: attn_mask and is_causal are not served")
        return super().forward(x)


class SizedTokens(Adapter):
    """A block over tokens ``(B, H * W, C)`` that come with their grid, as in PVTv2: ``forward(x, feat_size)``."""

    def forward(self, x: Tensor, feat_size: Sequence[int]) -> Tensor:
        height, width = integers(lambda: feat_size)
        return _through_map(self.block, x, (height, width))


def _through_map(block: nn.Module, x: Tensor, grid: Grid) -> Tensor:
    if x.dim() != 3 or shape_of(x)[1] != grid[0] * grid[1]:
        raise ValueError(
            f"x must have shape (B, N, C) with a token for each of the {grid[0]} x {grid[1]} cells of the grid after "
            f"the prefix tokens, got {tuple(shape_of(x))} without them"
        )
    return block(x.unflatten(1, grid)).flatten(1, 2)
