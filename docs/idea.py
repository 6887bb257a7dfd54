"""Draws docs/idea.png, the picture at the top of the README.

    python docs/idea.py

A query, the nine cells of its window, and the cells of the pooled map. The weights are a real softmax, over how alike
the cells' colours are; a model compares learned features instead.

The photo is scikit-learn's flower.jpg, by the Flickr user vultilion, under CC BY 2.0.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from sklearn.datasets import load_sample_image

CELL, RATIO = 30, 4  # pixels of a cell's side, cells of a pooled cell's side
HEIGHT, WIDTH = 360, 600  # pixels: 12 x 20 cells, 3 x 5 pooled ones
ROW, COLUMN = 4, 6  # of the query
FOVEA, PERIPHERY, INK = "#f58220", "#2a7fb8", "#333333"


def cells(photo: np.ndarray, side: int) -> np.ndarray:
    """(rows, columns, side, side, 3)"""
    return photo.reshape(HEIGHT // side, side, WIDTH // side, side, 3).swapaxes(1, 2)


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def square(ax: Axes, row: float, column: float, side: float, colour: str, width: float) -> None:
    corner = (column * CELL, row * CELL)
    ax.add_patch(Rectangle(corner, side * CELL, side * CELL, fill=False, edgecolor=colour, linewidth=width))


def show(ax: Axes, image: np.ndarray, title: str) -> None:
    ax.imshow(image, extent=(0, WIDTH, HEIGHT, 0))
    ax.set_title(title, fontsize=12, color=INK)
    ax.set(xlim=(0, WIDTH), ylim=(HEIGHT, 0))
    ax.set_axis_off()


def draw_photo(ax: Axes, photo: np.ndarray) -> None:
    show(ax, photo, "a map of cells, and a query among them")
    ax.vlines(range(CELL, WIDTH, CELL), 0, HEIGHT, color="white", linewidth=0.5, alpha=0.35)
    ax.hlines(range(CELL, HEIGHT, CELL), 0, WIDTH, color="white", linewidth=0.5, alpha=0.35)
    square(ax, ROW, COLUMN, 1, "white", 2.5)


def draw_view(ax: Axes, photo: np.ndarray, pooled: np.ndarray) -> None:
    show(ax, pooled, "what that query sees")
    for row, column in np.ndindex(pooled.shape[:2]):
        square(ax, row * RATIO, column * RATIO, RATIO, "white", 1)
    top, left = (ROW - 1) * CELL, (COLUMN - 1) * CELL
    bottom, right = top + 3 * CELL, left + 3 * CELL
    ax.imshow(photo[top:bottom, left:right], extent=(left, right, bottom, top))
    for i, j in np.ndindex(3, 3):
        square(ax, ROW - 1 + i, COLUMN - 1 + j, 1, "white", 0.5)
    square(ax, ROW - 1, COLUMN - 1, 3, FOVEA, 3)
    ax.text(left, top - 6, "fovea", color=FOVEA, fontsize=10, weight="bold")
    ax.text(WIDTH - 8, HEIGHT - 10, "periphery", color="white", fontsize=10, weight="bold", ha="right")


def draw_weights(ax: Axes, keys: list[np.ndarray], weights: np.ndarray) -> None:
    places = np.arange(len(keys)) + 0.8 * (np.arange(len(keys)) >= 9)
    ax.bar(places, weights, color=[FOVEA] * 9 + [PERIPHERY] * (len(keys) - 9), width=0.86)
    top = weights.max()
    for place, key in zip(places, keys, strict=True):
        ax.imshow(key, extent=(place - 0.43, place + 0.43, -0.45 * top, -0.06 * top), aspect="auto")
    for part, keys_of_part, colour in (
        ("3 x 3 cells", slice(9), FOVEA),
        ("3 x 5 pooled cells", slice(9, None), PERIPHERY),
    ):
        share = f"{part}: {weights[keys_of_part].sum():.0%} of the weight"
        ax.text(places[keys_of_part][0] - 0.43, 1.1 * top, share, color=colour, fontsize=12, weight="bold")
    ax.set_title("one softmax over both: they compete", fontsize=12, color=INK)
    ax.set(xlim=(places[0] - 0.6, places[-1] + 0.6), ylim=(-0.47 * top, 1.35 * top))
    ax.set_axis_off()


def main() -> None:
    photo = load_sample_image("flower.jpg")[40 : 40 + HEIGHT, 20 : 20 + WIDTH] / 255
    window = [cells(photo, CELL)[ROW + i, COLUMN + j] for i in (-1, 0, 1) for j in (-1, 0, 1)]
    pooled = cells(photo, CELL * RATIO).mean((2, 3))
    keys = window + [colour.reshape(1, 1, 3) for colour in pooled.reshape(-1, 3)]
    colours = np.array([key.mean((0, 1)) for key in keys])
    weights = softmax(-8 * ((colours - colours[4]) ** 2).sum(-1))

    figure = plt.figure(figsize=(10, 5.4), dpi=100)
    grid = figure.add_gridspec(
        2, 2, height_ratios=[3, 1.7], left=0.01, right=0.99, top=0.95, bottom=0, hspace=0.17, wspace=0.03
    )
    draw_photo(figure.add_subplot(grid[0, 0]), photo)
    draw_view(figure.add_subplot(grid[0, 1]), photo, pooled)
    draw_weights(figure.add_subplot(grid[1, :]), keys, weights)
    figure.savefig(Path(__file__).with_name("idea.png"))


if __name__ == "__main__":
    main()
