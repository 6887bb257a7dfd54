"""A small data set in COCO's format: coloured shapes before blurred backgrounds."""

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle")


def draw_shapes(root: Path, split: str, count: int, side: int, seed: int) -> None:
    """Write a COCO-format set of ``count`` images: one to three coloured shapes before a blurred random background."""
    random = np.random.default_rng(seed)
    folder = root / f"{split}2017"
    folder.mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for index in range(1, count + 1):
        noise = random.integers(0, 200, (4, 4, 3), dtype=np.uint8)
        image = Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC)
        cells = random.permutation(4)[: random.integers(1, 4)]  # quarters of the image, so that no shape hides another
        for cell in cells:
            kind = int(random.integers(len(SHAPES)))
            radius = random.uniform(0.13, 0.23) * side
            centre = (np.array([cell % 2, cell // 2]) + 0.5) * side / 2
            outline = outline_of(kind, centre, radius)
            ImageDraw.Draw(image).polygon([tuple(point) for point in outline], fill=tuple(random.integers(90, 256, 3)))
            low, high = outline.min(axis=0), outline.max(axis=0)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index,
                    "category_id": kind + 1,
                    "bbox": [*low.tolist(), *(high - low).tolist()],
                    "area": float(np.prod(high - low)),
                    "iscrowd": 0,
                    "segmentation": [outline.ravel().tolist()],
                }
            )
        image.save(folder / f"{index}.png")
        images.append({"id": index, "file_name": f"{index}.png", "height": side, "width": side})
    (root / "annotations").mkdir(exist_ok=True)
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(SHAPES)]
    content = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
    (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))


def outline_of(kind: int, centre: np.ndarray, radius: float) -> np.ndarray:
    """The corners (x, y) of a shape."""
    corners = {"circle": 32, "square": 4, "triangle": 3}[SHAPES[kind]]
    angle = (np.arange(corners) + 0.5) * 2 * np.pi / corners + (np.pi / 6 if corners == 3 else 0)
    return centre + radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)
