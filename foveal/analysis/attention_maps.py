"""Foveal and peripheral attention maps: what the queries of a block look at (figure 7)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveal.analysis._evaluating import evaluating
from foveal.blocks._attention_weights import AttentionWeights


def attention_blocks(model: nn.Module) -> list[str]:
    """The names of a model's modules whose attention can be looked at: those with ``attention_weights``."""
    return [name for name, module in model.named_modules() if hasattr(module, "attention_weights")]


def attention_weights(model: nn.Module, images: Tensor, block: str) -> AttentionWeights:
    """The attention weights of a block, for every query and head.

    The fused ops never store them, so they are computed again from what the block's mixer gets to see, by the ops'
    definitions. The model is run in eval mode, and left as it was. They take memory for every pair of a query and a
    key: 4 * heads * H * W * (k * k + Hp * Wp) bytes an image.

    Args:
        model: any model that holds one of foveal's attentions, or a mixer with a method
            ``attention_weights(x) -> AttentionWeights`` of its own.
        images: ``(B, in_chans, H, W)``, on the model's device.
        block: name of the attention, or of a module that holds no other, as "stages.2.blocks.14".

    Returns:
        :class:`AttentionWeights`. ``weights.pool[0, row, column].mean(0)`` is the peripheral map
        ``(Hp, Wp)`` of one query, averaged over the heads.

    Raises:
        ValueError: where ``block`` names no such module, or the images do not pass it exactly once.
    """
    names = attention_blocks(model)
    found = [name for name in names if name == block or name.startswith(f"{block}.")]
    if len(found) != 1:
        known = ", ".join(names) or "none"
        raise ValueError(f"block must name one attention, got {block!r}, which names {len(found)}; there are: {known}")
    mixer: Any = model.get_submodule(found[0])
    inputs: list[Tensor] = []
    hook = mixer.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with evaluating(model), torch.no_grad():
        try:
            model(images)
        finally:
            hook.remove()
        if len(inputs) != 1:
            raise ValueError(f"block must be run once by a forward pass, {block!r} was run {len(inputs)} times")
        return mixer.attention_weights(inputs[0])


def attention_map(weights: AttentionWeights, query: tuple[int, int]) -> Tensor:
    """Where on the map the attention of a query goes, fovea and periphery together.

    The weight of a pooled cell is shared by the cells that adaptive pooling averages in it. The positional term, which
    is no part of the softmax, is left out.

    Args:
        weights: of a block.
        query: row and column of a cell.

    Returns:
        ``(B, heads, H, W)``, which sums to one over the map; without gradients.
    """
    height, width = weights.pool.shape[1:3]
    check_query(query, (height, width))
    row, column = query
    pool = weights.pool[:, row, column].detach()
    with torch.inference_mode(False), torch.enable_grad():  # sharing is averaging transposed
        cells = pool.new_zeros(*pool.shape[:2], height, width).requires_grad_()
        averaged = F.adaptive_avg_pool2d(cells, (pool.shape[2], pool.shape[3]))
        (shared,) = torch.autograd.grad(averaged, cells, pool.clone())
    if weights.window is None:
        return shared
    window = weights.window[:, row, column].detach()
    size = window.shape[-1]
    radius = size // 2
    around = F.pad(shared, (radius,) * 4)
    around[..., row : row + size, column : column + size] += window
    return around[..., radius : radius + height, radius : radius + width]


def check_query(query: tuple[int, int], grid: tuple[int, int]) -> None:
    if len(query) != 2 or not all(0 <= cell < cells for cell, cells in zip(query, grid, strict=True)):
        raise ValueError(f"query must be a row and a column of the {grid[0]} x {grid[1]} map, got {query}")
