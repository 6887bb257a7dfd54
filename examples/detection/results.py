"""What a detector finds, how good it is, and a picture of it."""

import argparse
import contextlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import CocoDetection
from torchvision.transforms import v2
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks
from tqdm import tqdm

from detection.data import collate

COLOURS = ("#ffd21f", "#00e5ff", "#ff4fd8")


@torch.inference_mode()
def detect(detector: nn.Module, dataset: Dataset, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The detections of every image, in COCO's format."""
    detector.eval()
    results = []
    loader = DataLoader(dataset, args.batch_size, num_workers=args.workers, collate_fn=collate)
    for images, targets in tqdm(loader, unit=" batches", desc="evaluating", dynamic_ncols=True):
        for target, found in zip(targets, detector([x.to(args.device) for x in images]), strict=True):
            found = {name: value.cpu() for name, value in found.items()}
            sizes = found["boxes"][:, 2:] - found["boxes"][:, :2]
            for i, label in enumerate(found["labels"].tolist()):
                result = {"image_id": target["image_id"], "category_id": label, "score": found["scores"][i].item()}
                result["bbox"] = [*found["boxes"][i, :2].tolist(), *sizes[i].tolist()]
                if "masks" in found:
                    result["segmentation"] = coco_mask.encode(np.asfortranarray(found["masks"][i, 0].numpy() > 0.5))
                results.append(result)
    return results


def average_precision(coco: COCO, results: list[dict[str, Any]], kind: str) -> tuple[float, float]:
    """AP at IoU 0.50 to 0.95, and at 0.50; ``kind`` is "bbox" or "segm"."""
    if not results:
        return 0.0, 0.0
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(coco, coco.loadRes([dict(result) for result in results]), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats[0], evaluation.stats[1]


def draw_predictions(dataset: CocoDetection, results: list[dict[str, Any]], path: Path, threshold: float = 0.5) -> None:
    """Up to six images with what was found in them, surer than the threshold."""
    names = {category["id"]: category["name"] for category in dataset.coco.dataset["categories"]}
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    for panel, image_id in zip(figure.subplots(2, 3).flat, dataset.ids, strict=False):
        file = Path(dataset.root) / dataset.coco.loadImgs(image_id)[0]["file_name"]
        image = v2.functional.pil_to_tensor(Image.open(file).convert("RGB"))
        found = [r for r in results if r["image_id"] == image_id and r["score"] > threshold]
        colours = [COLOURS[r["category_id"] % len(COLOURS)] for r in found]
        if found and "segmentation" in found[0]:
            masks = torch.from_numpy(np.stack([coco_mask.decode(r["segmentation"]) for r in found])).bool()
            image = draw_segmentation_masks(image, masks, alpha=0.5, colors=colours)
        if found:
            boxes = torch.tensor([r["bbox"] for r in found])
            boxes[:, 2:] += boxes[:, :2]
            image = draw_bounding_boxes(image, boxes, colors=colours)
        panel.imshow(image.permute(1, 2, 0).numpy())
        for r, colour in zip(found, colours, strict=True):
            text = f"{names.get(r['category_id'], '?')} {r['score']:.2f}"
            panel.text(*r["bbox"][:2], text, color="black", backgroundcolor=colour, fontsize=8, va="bottom")
    for panel in figure.axes:
        panel.set_axis_off()
    figure.suptitle(f"Held-out images, detections surer than {threshold}")
    figure.savefig(path, dpi=110)
