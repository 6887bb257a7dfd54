"""Accuracy and cost of ImageNet models over image sizes (table 5 and figure 6 of the paper).

    python examples/evaluate.py --data imagenet=/data/imagenet/val
    python examples/evaluate.py --data imagenet=/data/imagenet/val --models transnext_tiny transnext_tiny:linear
    python examples/evaluate.py --data imagenet-a=/data/imagenet-a imagenet-c=/data/imagenet-c --sizes 224
    python examples/evaluate.py --cost --sizes 224 512 1024 2048 --models transnext_micro transnext_micro:linear

A model is any of timm's. After a colon, foveal's take options: "linear" pools to the grid of pre-training at any size,
"interpolate" resamples the position bias of the pre-training size instead of extrapolating it, "fixed-length" keeps the
length scale log N at the pre-training size.

The output folder gets results.json and results.png. The same command goes on where it was stopped, by Ctrl-C or by a
kill; more models, sizes and data sets add to the results. Data sets are folders with a folder for each class, named by
the class's synset: imagenet (the validation images), imagenet-a, imagenet-r, imagenet-sketch, imagenet-v2 (folders
named 0 to 999) and imagenet-c (a folder for each corruption, and in it for each severity); or folder, with classes of
any names, for a --checkpoint of as many classes. Below 384 the short side is resized to size / 0.875 and the centre cut
out, from 384 on the whole image is squashed to the square; images of ImageNet-C are cut out already.
"""

import argparse
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

from common.refusals import refuse, refuse_missing

if __name__ == "__main__":
    refuse_missing("--checkpoint", named=True)

import torch
from PIL import UnidentifiedImageError
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from common.arguments import add_device, add_import, check_device, positive
from common.interrupts import ignore_interrupts
from common.models import check_model, import_modules
from evaluation.cost import machine, paired_times, peak_memory
from evaluation.imagenet import DATA, ClassFolders, classes_of, folders_of, transform_for
from evaluation.models import OPTIONS, build, has_options
from evaluation.results import Results, draw, panels, print_table

TABLE_5 = (224, 256, 288, 320, 384, 448, 512, 640)
COSTS = ("latency", "memory")


def evaluate(args: argparse.Namespace, results: Results) -> list[dict[str, Any]]:
    """Every model at every size on every data set, each from where its row stands."""
    rows = []
    for data, root in args.data.items():
        opened = open_data(data, root)
        for spec in args.models:
            for size in args.sizes:
                model = None
                for name, images in opened.items():
                    key = {"data": name, "folder": images.root, "model": spec, "weights": args.weights[spec]}
                    row = results.row(**key, dtype=args.dtype, size=size)
                    rows.append(row)
                    if row.get("images") is None or row["images"] < row["of"]:
                        classes = len(images.known) if data == "folder" else 1000
                        model = model or build(spec, size, classes, args.weights[spec], args.dtype, args.device)
                        images.transform = transform_for(model, data, size)
                        evaluate_row(row, model, images, args, results)
    return rows


def open_data(data: str, root: Path) -> dict[str, ClassFolders]:
    try:
        folders, classes = folders_of(data, root), classes_of(data, root)
        return {name: ClassFolders(folder, classes) for name, folder in folders.items()}
    except (FileNotFoundError, ValueError) as error:
        refuse("--data", error)


def evaluate_row(
    row: dict[str, Any],
    model: nn.Module,
    test: ClassFolders,
    args: argparse.Namespace,
    results: Results,
) -> None:
    """Count hits from the first image that the row has not counted; the row is right after every batch."""
    done, top1, top5 = (row.get(name, 0) for name in ("images", "top-1_hits", "top-5_hits"))
    ahead, classes = Subset(test, range(done, len(test))), sorted(test.known.values())
    loader = DataLoader(ahead, args.batch_size, num_workers=args.workers, worker_init_fn=ignore_interrupts)
    title = f"{row['model']} at {row['size']} on {row['data']}"
    with tqdm(desc=title, initial=done, total=len(test), unit=" images", dynamic_ncols=True, leave=False) as bar:
        for images, labels in loader:
            with torch.inference_mode():
                logits = model(images.to(args.device, getattr(torch, args.dtype))).float().cpu()
            best, five = hits(logits, labels, classes)
            done, top1, top5 = done + len(labels), top1 + best, top5 + five
            row.update({"images": done, "of": len(test), "top-1_hits": top1, "top-5_hits": top5})
            results.save_now_and_then()
            bar.set_postfix_str(f"top-1 {top1 / done:.2%}", refresh=False)
            bar.update(len(labels))
    results.save()


def hits(logits: Tensor, labels: Tensor, classes: list[int]) -> tuple[int, int]:
    """How many labels are the best, and how many among the best five, of the classes in question."""
    best = torch.tensor(classes)[logits[:, classes].topk(min(5, len(classes))).indices]
    found = best == labels[:, None]
    return int(found[:, 0].sum()), int(found.sum())


def measure_costs(args: argparse.Namespace, results: Results) -> list[dict[str, Any]]:
    """Latency, peak memory or both of every model at every size, an image at a time; any weights will do."""
    rows = []
    for size in tqdm(args.sizes, desc="cost", unit=" sizes", leave=False):
        key = {"cost": "forward, batch 1", **machine(args.device), "dtype": args.dtype, "size": size}
        here = {spec: results.row(**key, model=spec) for spec in args.models}
        rows += here.values()
        builds = {spec: partial(build, spec, size, 1000, "random", args.dtype, args.device) for spec in args.models}
        images = torch.randn(1, 3, size, size, dtype=getattr(torch, args.dtype), device=args.device)
        if "latency" in args.cost:
            untimed = {spec: builds[spec]() for spec, row in here.items() if "seconds" not in row}
            for spec, times in paired_times(untimed, images, args.rounds).items():
                here[spec].update(times)
            results.save()
        for spec, row in here.items():
            if "memory" in args.cost and "peak_bytes" not in row:
                row["peak_bytes"] = peak_memory(builds[spec], images, prepare=partial(import_modules, args))
                results.save()
    return rows


def assigned(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"expected NAME=PATH, got {text!r}")
    return name, value


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", nargs="+", default=["transnext_tiny"], metavar="MODEL[:OPTION,...]", help="default: transnext_tiny")
    add("--data", nargs="+", type=assigned, default=[], metavar="NAME=PATH", help=f"NAME is one of {', '.join(DATA)}")
    add("--cost", nargs="*", choices=COSTS, help="measure latency, memory or (alone) both of a forward pass, batch 1")
    add("--sizes", nargs="+", type=positive, default=TABLE_5, metavar="PIXELS", help="image sides; default: table 5's")
    add("--checkpoint", nargs="+", type=assigned, default=[], metavar="MODEL=FILE", help="local weights of a model")
    add("--random-weights", action="store_true", help="do without weights: shows that it runs")
    add("--batch-size", type=positive, default=32, help="for accuracy; default: %(default)s")
    add("--rounds", type=positive, default=5, help="for latency; default: %(default)s")
    add(
        "--workers",
        type=int,
        default=min(4, os.cpu_count() or 1),
        help="processes that load images; default: %(default)s",
    )
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="default: %(default)s")
    add_import(parser)
    add_device(parser)
    add("--output", type=Path, default=Path("runs/evaluate"), metavar="FOLDER", help="default: %(default)s")
    args = parser.parse_args(argv)
    import_modules(args)

    for spec in args.models:
        name, _, options = spec.partition(":")
        check_model(name, "--models")
        for option in filter(None, options.split(",")):
            if option not in OPTIONS:
                refuse("--models", f"the options are {', '.join(OPTIONS)}, got {option!r}")
            if not has_options(name):
                refuse("--models", f"{name} is none of foveal's and takes no option, got {option!r}")
    for name, _ in args.data:
        if name not in DATA:
            refuse("--data", f"the names are {', '.join(DATA)}, got {name!r}")
    files = dict(args.checkpoint)
    for name in files:
        if name not in (spec.partition(":")[0] for spec in args.models):
            refuse("--checkpoint", f"{name} is not among --models")
    if not args.data and args.cost is None:
        parser.error("nothing to do: give --data, --cost or both")
    args.data = {name: Path(path) for name, path in args.data}
    otherwise = "random" if args.random_weights else "hub"
    args.weights = {spec: files.get(spec.partition(":")[0], otherwise) for spec in args.models}
    args.sizes = sorted(set(args.sizes))
    args.cost = [] if args.cost is None else args.cost or COSTS
    check_device(args.device)
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    results = Results(args.output)
    try:
        accuracy = evaluate(args, results)
        costs = measure_costs(args, results) if args.cost else []
    except KeyboardInterrupt:
        results.save()
        print(f"Stopped. The same command goes on from {results.path}", file=sys.stderr)
        return 130
    except UnidentifiedImageError as error:
        results.save()
        refuse("--data", str(error).splitlines()[-1])  # after the traceback of a worker
    found = panels(accuracy, costs, args.models, args.sizes)
    for title, lines in found.items():
        print_table(title, lines, args.sizes)
    if args.data and "random" in args.weights.values():
        print("\nWhere weights are random, accuracies mean nothing.")
    draw(found, args.sizes, results.path.with_suffix(".png"))
    print(f"\n{results.path} and {results.path.with_suffix('.png')} hold the figures")
    return 0


if __name__ == "__main__":
    sys.exit(main())
