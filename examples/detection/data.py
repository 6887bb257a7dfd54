"""COCO's images and objects as torchvision's detectors want them."""

import contextlib
import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
from torchvision.transforms import v2

from common.refusals import refuse


def open_coco(root: Path, split: str) -> CocoDetection:
    folder, annotations = root / f"{split}2017", root / "annotations" / f"instances_{split}2017.json"
    for path in (folder, annotations):
        if not path.exists():
            refuse("--coco", f"there is no {path}")
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools tells how long it took
        return CocoDetection(folder, annotations)


def prepared(dataset: CocoDetection, masks: bool, training: bool) -> Dataset:
    """Tensors and boxes; for training, flipped now and then, without crowds, empty boxes and images without objects."""
    flip = [v2.RandomHorizontalFlip()] if training else []
    dataset.transforms = v2.Compose([v2.ToImage(), *flip, v2.ToDtype(torch.float32, scale=True)])
    keys = ["image_id", "boxes", "labels", *(["masks"] if masks else [])]
    wrapped = wrap_dataset_for_transforms_v2(dataset, target_keys=keys)
    if not training:
        return wrapped
    of_image = dataset.coco.imgToAnns
    for objects in of_image.values():
        objects[:] = [x for x in objects if not x["iscrowd"] and min(x["bbox"][2:]) > 0]
    return Subset(wrapped, [i for i, image in enumerate(dataset.ids) if of_image[image]])


def collate(samples: list) -> tuple[list, list]:
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)


def to_device(target: dict[str, Any], device: str) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in target.items()}
