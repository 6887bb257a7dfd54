"""ImageNet's validation images and its relatives, as folders of class folders."""

from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from statistics import mean

from timm.data import ImageNetInfo, create_transform, resolve_model_data_config
from torch import nn
from torchvision.datasets import ImageFolder

DATA = ("imagenet", "imagenet-a", "imagenet-r", "imagenet-sketch", "imagenet-v2", "imagenet-c", "folder")
SYNSETS = {name: index for index, name in enumerate(ImageNetInfo().label_names())}
SEVERITIES = (1, 2, 3, 4, 5)
# Error rates of AlexNet by corruption, averaged over the five severities (Hendrycks and Dietterich 2019).
ALEXNET = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}


def classes_of(data: str, root: Path) -> dict[str, int]:
    """The class index of each folder that a data set may hold."""
    if data == "folder":
        return {name: index for index, name in enumerate(sorted(path.name for path in root.iterdir() if path.is_dir()))}
    if data == "imagenet-v2":
        return {str(index): index for index in range(1000)}
    if data in ("imagenet-a", "imagenet-r"):  # 200 classes each, in lists that timm ships
        names = (files("timm.data") / "_info" / f"{data.replace('-', '_')}_synsets.txt").read_text().split()
        return {name: SYNSETS[name] for name in names}
    return SYNSETS


def folders_of(data: str, root: Path) -> dict[str, Path]:
    """The folders to evaluate, by their names in the results: 75 of ImageNet-C, one of each other data set.

    Raises:
        FileNotFoundError: where one of them is missing.
    """
    folders = {data: root}
    if data == "imagenet-c":  # its archives add a folder for the kind of corruption
        homes = {name: next(iter([*root.glob(f"*/{name}"), root / name])) for name in ALEXNET}
        folders = {f"{data}/{name}/{s}": home / str(s) for name, home in homes.items() for s in SEVERITIES}
    for folder in folders.values():
        if not folder.is_dir():
            raise FileNotFoundError(f"no folder {folder}")
    return folders


class ClassFolders(ImageFolder):
    """Images in class folders, labelled with the classes that the folders' names stand for.

    Raises:
        FileNotFoundError: where there is no class folder, or one without an image.
        ValueError: where a folder's name stands for no class of the data set.
    """

    def __init__(self, root: Path, classes: Mapping[str, int]):
        self.known = classes
        super().__init__(str(root))

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        names, _ = super().find_classes(directory)
        unknown = [name for name in names if name not in self.known]
        if unknown:
            raise ValueError(f"{directory} holds the folder {unknown[0]}, which is no class of the data set")
        return names, {name: self.known[name] for name in names}


def transform_for(model: nn.Module, data: str, size: int) -> Callable:
    """The paper's preparation at a size, in the model's own colours and interpolation."""
    if data == "imagenet-c":
        crop = {"crop_pct": 1.0, "crop_mode": "center"}
    elif size < 384:
        crop = {"crop_pct": 0.875, "crop_mode": "center"}
    else:
        crop = {"crop_pct": 1.0, "crop_mode": "squash"}
    return create_transform(**resolve_model_data_config(model) | crop | {"input_size": (3, size, size)})


def mean_corruption_error(errors: Mapping[str, float]) -> float:
    """mCE: the errors of the 75 folders of ImageNet-C, per corruption relative to AlexNet's, averaged."""
    ratios = [mean(errors[f"imagenet-c/{name}/{s}"] for s in SEVERITIES) / alexnet for name, alexnet in ALEXNET.items()]
    return mean(ratios)
