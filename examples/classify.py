"""Name what is on an image, or on every image of a folder, with a model trained on ImageNet.

    python examples/classify.py photo.jpg                                     # weights from the hub
    python examples/classify.py photos/ --model transnext_base.in1k_384 --batch-size 8
    python examples/classify.py photo.jpg --checkpoint transnext_tiny_224_1k.pth

Images are prepared as the variant's weights ask for: the 224 models take a centre crop, those fine-tuned at 384 the
whole image squashed to a square. The part of --model after the dot says which weights, and so which preparation.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import shorten
from typing import NoReturn

import timm
import torch
from PIL import Image, UnidentifiedImageError
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset, resolve_model_data_config
from timm.data.readers.img_extensions import get_img_extensions
from torch import Tensor, nn
from tqdm import tqdm

from foveal.models import Backbone
from foveal.models.checkpoints import checkpoint_filter_fn, load_file

TOP = 5


def refuse(argument: str, problem: str) -> NoReturn:
    print(f"classify.py: error: argument {argument}: {problem}", file=sys.stderr)
    sys.exit(2)


def brief(error: Exception) -> str:
    return f"{type(error).__name__}: {shorten(str(error), 200)}"


def find_images(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        refuse("images", f"no file or folder {path}")
    extensions = get_img_extensions(as_set=True)
    images = sorted(file for file in path.rglob("*") if file.suffix.lower() in extensions)
    if not images:
        refuse("images", f"no image in the folder {path}")
    return images


def load_model(name: str, checkpoint: Path | None, random_weights: bool) -> nn.Module:
    """A model with the weights of the hub, of a checkpoint, or, if asked for, with none."""
    if not timm.is_model(name):
        refuse("--model", f"timm knows no model {name!r}; timm.list_models() names those it does")
    if random_weights:
        print("The weights are random, so the predictions mean nothing.", file=sys.stderr)
        return timm.create_model(name)
    if checkpoint is None:
        try:
            return timm.create_model(name, pretrained=True)
        except Exception as error:  # of whatever stands between us and the hub
            refuse(
                "--model", f"no weights of {name} from the hub; pass --checkpoint or --random-weights ({brief(error)})"
            )
    model = timm.create_model(name)
    try:
        weights = load_file(checkpoint)
        model.load_state_dict(checkpoint_filter_fn(weights, model) if isinstance(model, Backbone) else weights)
    except Exception as error:  # no such file, no checkpoint, or that of another model
        refuse("--checkpoint", f"{checkpoint} holds no weights of {name} ({brief(error)})")
    return model


def predictions(model: nn.Module, images: list[Path], batch_size: int, device: str) -> Iterator[tuple[Path, Tensor]]:
    """Each image with the probabilities of the classes."""
    transform = create_transform(**resolve_model_data_config(model))
    for start in range(0, len(images), batch_size):
        paths = images[start : start + batch_size]
        batch = torch.stack([transform(read_image(path)) for path in paths])
        with torch.inference_mode():
            probabilities = model(batch.to(device)).softmax(dim=-1).cpu()
        yield from zip(paths, probabilities, strict=True)


def read_image(path: Path) -> Image.Image:
    try:
        return Image.open(path).convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        refuse("images", f"cannot read {path}: {error}")


def positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="an image file, or a folder of them")
    parser.add_argument("--model", default="transnext_tiny.in1k", help="a model of timm's; default: %(default)s")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--checkpoint", type=Path, help="local weights: an official .pth, or foveal's .safetensors")
    weights.add_argument("--random-weights", action="store_true", help="do without weights: shows that it runs")
    parser.add_argument("--batch-size", type=positive, default=16, help="default: %(default)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    args = parser.parse_args(argv)
    try:
        torch.empty(0, device=args.device)
    except (AssertionError, RuntimeError) as error:
        refuse("--device", brief(error))

    images = find_images(args.images)
    model = load_model(args.model, args.checkpoint, args.random_weights).eval().to(args.device)
    names = ImageNetInfo(infer_imagenet_subset(model) or "imagenet-1k")
    results = predictions(model, images, args.batch_size, args.device)
    for path, probabilities in tqdm(results, total=len(images), unit=" images", disable=len(images) == 1):
        best = probabilities.topk(TOP)
        lines = [f"  {value:6.1%}  {names.index_to_description(i.item())}" for value, i in zip(*best, strict=True)]
        tqdm.write("\n".join([str(path), *lines]))


if __name__ == "__main__":
    main()
