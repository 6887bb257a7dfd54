"""Train a detector over a foveal backbone: torchvision's Mask R-CNN or RetinaNet on a feature pyramid.

    python examples/detect.py                               # shapes that it draws itself, 4 minutes on two cores
    python examples/detect.py --detector retinanet
    python examples/detect.py --coco /data/coco --model transnext_tiny --backbone-weights transnext_tiny_224_1k.pth \\
        --size 800 --epochs 12 --batch-size 16 --frozen-stages 1 --grad-checkpointing
    python examples/detect.py --weights runs/detect/model.safetensors --epochs 0           # measure, and draw again

The folder of --coco holds train2017/, val2017/ and annotations/instances_{train,val}2017.json; the shapes are written
in the same layout. The output folder gets model.safetensors, predictions.png and, for shapes, the data.
"""

import argparse
import sys
from pathlib import Path

from common.refusals import refuse, refuse_missing

if __name__ == "__main__":
    refuse_missing("--weights", "--backbone-weights")

import torch
from safetensors.torch import load_model, save_model
from timm.scheduler import CosineLRScheduler
from timm.utils import get_outdir, random_seed
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from common.arguments import add_device, add_import, at_least, check_device
from common.models import check_model, import_modules, weights_of
from detection.data import collate, open_coco, prepared, to_device
from detection.detector import build_detector, check_pyramid, parameter_groups
from detection.results import average_precision, detect, draw_predictions
from detection.shapes import draw_shapes
from foveal.analysis import count_parameters


def train(detector: nn.Module, dataset: Dataset, args: argparse.Namespace) -> None:
    loader = DataLoader(
        dataset, args.batch_size, shuffle=True, drop_last=True, num_workers=args.workers, collate_fn=collate
    )
    steps = args.epochs * len(loader)
    optimizer = torch.optim.AdamW(parameter_groups(detector, 0.05, args.layer_decay), lr=args.lr)
    warmup = {"warmup_t": min(500, steps // 10), "warmup_lr_init": args.lr / 1000}
    scheduler = CosineLRScheduler(optimizer, t_initial=steps, lr_min=args.lr / 100, t_in_epochs=False, **warmup)
    detector.train()
    step, mean = 0, None
    with tqdm(total=steps, unit=" steps", dynamic_ncols=True) as bar:
        for epoch in range(args.epochs):
            for images, targets in loader:
                scheduler.step_update(step)
                losses = detector([x.to(args.device) for x in images], [to_device(t, args.device) for t in targets])
                loss = sum(losses.values())
                if not loss.isfinite():
                    sys.exit(f"detect.py: the loss is {loss.item()} at step {step}; a smaller --lr may help")
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(detector.parameters(), 1.0)
                optimizer.step()
                step += 1
                mean = loss.item() if mean is None else 0.95 * mean + 0.05 * loss.item()
                bar.set_postfix(epoch=epoch + 1, loss=f"{mean:.3f}", refresh=False)
                bar.update()


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--detector", choices=("maskrcnn", "retinanet"), default="maskrcnn", help="default: %(default)s")
    add(
        "--model",
        default="transnext_micro",
        help="a TransNeXt (shallow for shapes) or a Backbone; default: %(default)s",
    )
    add("--coco", type=Path, metavar="FOLDER", help="a COCO data set; default: shapes that are drawn for the run")
    add("--backbone-weights", type=Path, metavar="FILE", help="a classifier's or a detector's, .pth or .safetensors")
    add("--weights", type=Path, metavar="FILE", help="a model.safetensors of this example, to start from")
    add("--size", type=at_least(32), help="short side of the images in pixels; default: 128 for shapes, else 800")
    add("--images", type=at_least(1), default=240, help="shapes to draw for training; default: %(default)s")
    add("--epochs", type=at_least(0), help="default: 8 for shapes, else 12; 0 only evaluates")
    add("--batch-size", type=at_least(1), default=8, help="default: %(default)s")
    add("--lr", type=float, help="AdamW's learning rate; default: 1e-3 for shapes, else 1e-4")
    add("--layer-decay", type=float, default=1.0, help="of the learning rate, block by block; default: %(default)s")
    add("--drop-path", type=float, default=0.1, help="default: %(default)s")
    add("--frozen-stages", type=int, choices=range(5), default=0, help="default: %(default)s")
    add("--grad-checkpointing", action="store_true", help="trade time for memory")
    add("--interpolate-bias", action="store_true", help="resample the position bias made for --size, not extrapolate")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--workers", type=at_least(0), help="processes that load images; default: 0 for shapes, else 4")
    add_import(parser)
    add_device(parser)
    add("--output", type=Path, metavar="FOLDER", help="default: a new folder runs/detect, runs/detect-1, ...")
    args = parser.parse_args(argv)
    import_modules(args)
    check_model(args.model)
    check_pyramid(args.model)
    check_device(args.device)
    defaults = {"size": 800, "epochs": 12, "lr": 1e-4, "workers": 4}
    if not args.coco:
        defaults = {"size": 128, "epochs": 8, "lr": 1e-3, "workers": 0}
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.output = args.output or Path(get_outdir("runs", "detect", inc=True))
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    random_seed(args.seed)
    root = args.coco or args.output / "shapes"
    if not args.coco:
        draw_shapes(root, "train", args.images, args.size, seed=args.seed)
        draw_shapes(root, "val", max(6, args.images // 8), args.size, seed=args.seed + 1)
    masks = args.detector == "maskrcnn"
    train_set, test_set = open_coco(root, "train"), open_coco(root, "val")
    training, testing = prepared(train_set, masks, training=True), prepared(test_set, masks=False, training=False)
    if args.batch_size > len(training):
        refuse("--batch-size", f"must be at most the number of training images, {len(training)}")
    detector = build_detector(args, num_classes=max(train_set.coco.getCatIds()) + 1).to(args.device)
    if args.weights:
        with weights_of(args.weights, "this detector", "--weights"):
            load_model(detector, args.weights)
    args.output.mkdir(parents=True, exist_ok=True)
    size = count_parameters(detector)
    print(f"{args.detector} over {args.model}, {size:,} parameters, {len(training)} images, into {args.output}")
    try:
        if args.epochs:
            train(detector, training, args)
    except KeyboardInterrupt:
        print("Stopped; what was learned so far is kept and measured.")
    save_model(detector, str(args.output / "model.safetensors"))
    results = detect(detector, testing, args)
    for kind, name in (("bbox", "box"), ("segm", "mask"))[: 1 + masks]:
        ap, ap50 = average_precision(test_set.coco, results, kind)
        print(f"{name} AP {ap:.1%} (at IoU 0.5: {ap50:.1%}) on {len(testing)} held-out images")
    draw_predictions(test_set, results, args.output / "predictions.png")
    print(f"Weights and a picture are in {args.output}")


if __name__ == "__main__":
    main()
