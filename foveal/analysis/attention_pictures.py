"""Pictures of attention maps, over the image that they belong to."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveal.analysis.attention_maps import attention_map, check_query
from foveal.blocks._attention_weights import AttentionWeights

Query = tuple[int, int]


def draw_attention_maps(
    image: Tensor,
    weights: AttentionWeights,
    queries: Sequence[Query],
    path: str | Path,
    *,
    heads: Sequence[int] | None = None,
    title: str | None = None,
) -> None:
    """Write a PNG with a row for each query: where it is, its window, the pooled map, and both together on the image.

    Weights are in percent: those of window and pooled map sum to 100. Every column has one colour scale for all rows,
    a logarithmic one where fovea and periphery are seen together. Needs matplotlib.

    Args:
        image: ``(3, H, W)`` or ``(1, H, W)``, in [0, 1].
        weights: of a block, for that image alone (B = 1).
        queries: rows and columns of cells.
        path: the file to write.
        heads: the heads to show, each in a row of its own; None shows their average.
        title: what stands above the picture.

    Raises:
        ValueError: where an argument does not fit the weights.
    """
    grid, count = (weights.pool.shape[1], weights.pool.shape[2]), weights.pool.shape[3]
    if image.dim() != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"image must have shape (3, H, W) or (1, H, W), got {tuple(image.shape)}")
    if weights.pool.shape[0] != 1:
        raise ValueError(f"weights must be those of one image, got {weights.pool.shape[0]} of them")
    if not queries:
        raise ValueError("queries must hold at least one cell, got none")
    for query in queries:
        check_query(query, grid)
    if heads is not None and not (heads and all(0 <= head < count for head in heads)):
        raise ValueError(f"heads must be some of the block's heads, 0 to {count - 1}, got {heads}")
    rows = [(query, head) for query in queries for head in ([None] if heads is None else heads)]

    from matplotlib.figure import Figure

    width = 2 + 2 * (weights.window is not None) + (weights.positional is not None)
    figure = Figure(figsize=(2.6 * width, 2.75 * len(rows) + 1.1), layout="constrained")
    heights = [1.0] * len(rows) + [0.05]  # below each column its colour bar
    columns = iter(figure.subplots(len(rows) + 1, width, gridspec_kw={"height_ratios": heights}).T)
    photo = image.detach().float().cpu().expand(3, -1, -1).permute(1, 2, 0).clamp(0, 1).numpy()

    def percent(values: Tensor) -> list[Tensor]:
        """Of each row's query and head; values ``(1, H, W, heads, *)``."""
        picked = [values[0, i, j].mean(0) if head is None else values[0, i, j, head] for (i, j), head in rows]
        return [100 * value.detach().float().cpu() for value in picked]

    cells = 1 if weights.window is None else weights.window.shape[-1]
    _draw_queries(next(columns), photo, rows, grid, cells)
    pool, pooled = percent(weights.pool), " x ".join(map(str, weights.pool.shape[4:]))
    if weights.window is None:
        titles = [f"all {pooled} cells"] * len(rows)
        _draw_over(figure, next(columns), photo, pool, titles, "weight of a cell, %")
    else:
        window = percent(weights.window)
        inside = [_inside(query, grid, cells) for query, _ in rows]
        titles = [f"window: {values.sum():.0f}%" for values in window]
        _draw_window(figure, next(columns), window, inside, titles, "weight of a cell, %")
        if weights.positional is not None:
            positional, titles = percent(weights.positional), ["added to the window"] * len(rows)
            _draw_window(figure, next(columns), positional, inside, titles, "positional term, %", signed=True)
        titles = [f"pooled to {pooled}: {values.sum():.0f}%" for values in pool]
        _draw_over(figure, next(columns), photo, pool, titles, "weight of a pooled cell, %")
        maps = [attention_map(weights, query)[0] for query, _ in rows]
        both = [
            100 * (m.mean(0) if head is None else m[head]).float().cpu()
            for m, (_, head) in zip(maps, rows, strict=True)
        ]
        _draw_over(figure, next(columns), photo, both, ["both on the map"] * len(rows), "weight of a cell, %", log=True)
    figure.suptitle(title or f"Attention on a map of {grid[0]} x {grid[1]} cells")
    figure.savefig(path, dpi=100)


def _inside(query: Query, grid: Query, cells: int) -> Tensor:
    """Which of a query's window cells lie on the map: ``(k, k)``."""
    rows, columns = (torch.arange(cells) - cells // 2 + place for place in query)
    return ((rows >= 0) & (rows < grid[0]))[:, None] & ((columns >= 0) & (columns < grid[1]))


def _draw_queries(panels: Any, photo: Any, rows: list[tuple[Query, int | None]], grid: Query, cells: int) -> None:
    """The image, with a frame around the query and around its window."""
    from matplotlib.patches import Rectangle

    height, width = photo.shape[0] / grid[0], photo.shape[1] / grid[1]  # of a cell, in pixels
    panels[-1].set_axis_off()
    for panel, (query, head) in zip(panels[:-1], rows, strict=True):
        panel.imshow(photo)
        for size, style in {cells: ":", 1: "-"}.items():
            corner = (query[1] - size // 2) * width - 0.5, (query[0] - size // 2) * height - 0.5
            panel.add_patch(Rectangle(corner, size * width, size * height, fill=False, color="red", linestyle=style))
        panel.set(title=f"query at {query[0]}, {query[1]}", xticks=[], yticks=[])
        panel.set_ylabel("average of the heads" if head is None else f"head {head}")


def _draw_window(
    figure: Any,
    panels: Any,
    values: list[Tensor],
    inside: list[Tensor],
    titles: list[str],
    label: str,
    signed: bool = False,
) -> None:
    """The cells of the window with their weights, hatched outside the map."""
    highest = max(value.abs().max().item() for value in values) or 1.0
    colours = {"cmap": "RdBu_r", "vmin": -highest} if signed else {"cmap": "magma", "vmin": 0}
    for panel, value, known, title in zip(panels[:-1], values, inside, titles, strict=True):
        shown = panel.imshow(value.where(known, float("nan")).numpy(), vmax=highest, **colours)
        panel.patch.set(hatch="///", edgecolor="grey")
        for i, j in known.nonzero().tolist() if len(value) <= 5 else []:
            weight = value[i, j].item()
            on_dark = (abs(weight) > 0.6 * highest) == signed
            text = f"{weight:+.1f}" if signed else f"{weight:.1f}"
            panel.text(j, i, text, color="white" if on_dark else "black", ha="center", va="center")
        panel.set(title=title, xticks=[], yticks=[])
    figure.colorbar(shown, cax=panels[-1], location="bottom", label=label)


def _draw_over(
    figure: Any, panels: Any, photo: Any, values: list[Tensor], titles: list[str], label: str, log: bool = False
) -> None:
    """A map over the image, which is greyed."""
    from matplotlib.colors import LogNorm, Normalize

    highest = max(value.max().item() for value in values)
    norm = LogNorm(highest / 10_000, highest, clip=True) if log else Normalize(0, highest)
    height, width = photo.shape[:2]
    for panel, value, title in zip(panels[:-1], values, titles, strict=True):
        panel.imshow(0.3 + 0.7 * photo.mean(-1), cmap="gray", vmin=0, vmax=1)
        seen = {"alpha": 0.65, "extent": (-0.5, width - 0.5, height - 0.5, -0.5)}
        shown = panel.imshow(value.numpy(), norm=norm, cmap="magma", interpolation="nearest", **seen)
        panel.set(title=title, xticks=[], yticks=[])
    figure.colorbar(shown, cax=panels[-1], location="bottom", label=label)
