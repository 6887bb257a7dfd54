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

from common.refusals import refuse_missing

if __name__ == "__main__":
    refuse_missing("--checkpoint")

import torch
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset, resolve_model_data_config
from torch import Tensor, nn
from tqdm import tqdm

from common.arguments import add_device, add_import, check_device, positive
from common.images import find_images, read_image
from common.models import import_modules, load_model

TOP = 5


def predictions(model: nn.Module, images: list[Path], batch_size: int, device: str) -> Iterator[tuple[Path, Tensor]]:
    """Each image with the probabilities of the classes."""
    transform = create_transform(**resolve_model_data_config(model))
    for start in range(0, len(images), batch_size):
        paths = images[start : start + batch_size]
        batch = torch.stack([transform(read_image(path)) for path in paths])
        with torch.inference_mode():
            probabilities = model(batch.to(device)).softmax(dim=-1).cpu()
        yield from zip(paths, probabilities, strict=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="an image file, or a folder of them")
    parser.add_argument("--model", default="transnext_tiny.in1k", help="a model of timm's; default: %(default)s")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--checkpoint", type=Path, help="local weights: an official .pth, or foveal's .safetensors")
    weights.add_argument("--random-weights", action="store_true", help="do without weights: shows that it runs")
    parser.add_argument("--batch-size", type=positive, default=16, help="default: %(default)s")
    add_import(parser)
    add_device(parser)
    args = parser.parse_args(argv)
    check_device(args.device)
    import_modules(args)
    images = find_images(args.images)
    if args.random_weights:
        print("The weights are random, so the predictions mean nothing.", file=sys.stderr)
    model = load_model(args.model, args.checkpoint, args.random_weights).eval().to(args.device)
    names = ImageNetInfo(infer_imagenet_subset(model) or "imagenet-1k")
    results = predictions(model, images, args.batch_size, args.device)
    for path, probabilities in tqdm(results, total=len(images), unit=" images", disable=len(images) == 1):
        best = probabilities.topk(TOP)
        lines = [f"  {value:6.1%}  {names.index_to_description(i.item())}" for value, i in zip(*best, strict=True)]
        tqdm.write("\n".join([str(path), *lines]))


if __name__ == "__main__":
    main()
