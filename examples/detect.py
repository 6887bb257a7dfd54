"""Train a detector over a foveal backbone: torchvision's Mask R-CNN or RetinaNet on a feature pyramid.

    python examples/detect.py                               # shapes that it draws itself, a few minutes on two cores
    python examples/detect.py --detector retinanet
    python examples/detect.py --coco /data/coco --model transnext_tiny --backbone-weights transnext_tiny_224_1k.pth \\
        --size 800 --epochs 12 --batch-size 16 --frozen-stages 1 --grad-checkpointing
    python examples/detect.py --weights runs/detect/model.safetensors --epochs 0           # measure, and draw again

The folder of --coco holds train2017/, val2017/ and annotations/instances_{train,val}2017.json; the shapes are written
in the same layout. The output folder gets model.safetensors, predictions.png and, for shapes, the data.
"""

import argparse
import contextlib
import io
import json
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import timm
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from safetensors.torch import load_model, save_model
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from timm.utils import freeze, get_outdir, random_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
from torchvision.models.detection import MaskRCNN, RetinaNet
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7
from torchvision.transforms import v2
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks
from tqdm import tqdm

from foveal.models.checkpoints import checkpoint_filter_fn, load_file

SHAPES = ("circle", "square", "triangle")
COLOURS = ("#ffd21f", "#00e5ff", "#ff4fd8")


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


class PyramidBackbone(nn.Module):
    """The feature maps of a timm model through a feature pyramid, as torchvision's detectors want them.

    Args:
        features: a timm model made with ``features_only=True``.
        channels: of every level of the pyramid.
        extra_blocks: what makes the coarsest levels.
        frozen_stages: the first stages that are left as they are, without stochastic depth.
    """

    def __init__(self, features: nn.Module, channels: int, extra_blocks: nn.Module, frozen_stages: int = 0):
        super().__init__()
        self.body = features
        self.fpn = FeaturePyramidNetwork(features.feature_info.channels(), channels, extra_blocks)
        self.out_channels = channels
        self.frozen = [info["module"] for info in features.model.feature_info[:frozen_stages]]
        if self.frozen:
            freeze(features.model, self.frozen)

    def train(self, mode: bool = True) -> "PyramidBackbone":
        super().train(mode)
        for name in self.frozen:
            self.body.model.get_submodule(name).eval()
        return self

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.fpn(OrderedDict((str(i), x) for i, x in enumerate(self.body(images))))


def build_detector(args: argparse.Namespace, num_classes: int) -> nn.Module:
    indices = (0, 1, 2, 3) if args.detector == "maskrcnn" else (1, 2, 3)
    kwargs: dict[str, Any] = {"features_only": True, "out_indices": indices, "drop_path_rate": args.drop_path}
    if not args.coco:
        kwargs |= {"depths": (1, 1, 2, 1), "pretrain_size": args.size}  # shapes are easy
    if args.interpolate_bias:
        kwargs |= {"bias_resampling": "interpolate", "img_size": args.size}
    features = timm.create_model(args.model, **kwargs)
    if args.backbone_weights:
        load_backbone(features.model, args.backbone_weights)
    if args.grad_checkpointing:
        features.model.set_grad_checkpointing()
    channels = 256 if args.coco else 64
    maskrcnn = args.detector == "maskrcnn"
    extra = LastLevelMaxPool() if maskrcnn else LastLevelP6P7(channels, channels)
    backbone = PyramidBackbone(features, channels, extra, args.frozen_stages)
    limits = {"min_size": args.size, "max_size": args.size * 5 // 3}
    if not maskrcnn:
        return RetinaNet(backbone, num_classes, **limits)
    if args.coco:
        return MaskRCNN(backbone, num_classes, **limits)
    detector = MaskRCNN(backbone, num_classes, **limits, box_batch_size_per_image=32, rpn_post_nms_top_n_train=200)
    detector.roi_heads.mask_head = MaskRCNNHeads(channels, (channels, channels), dilation=1)
    detector.roi_heads.mask_predictor = MaskRCNNPredictor(channels, channels, num_classes)
    return detector


def load_backbone(model: nn.Module, path: Path) -> None:
    """Weights of a classifier, or the ``backbone.*`` part of a detector's, in foveal's or the official layout."""
    try:
        weights = checkpoint_filter_fn(load_file(path), model)
        model.load_state_dict({name: value for name, value in weights.items() if not name.startswith("head.")})
    except Exception as error:  # no such file, no checkpoint, or that of another model
        refuse("--backbone-weights", f"{path} holds no weights of this backbone ({type(error).__name__}: {error})")


def parameter_groups(detector: nn.Module, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """The backbone's with a learning rate that falls towards the stem, all others with the full one."""
    model = detector.backbone.body.model
    groups = param_groups_layer_decay(
        model, weight_decay, no_weight_decay_list=model.no_weight_decay(), layer_decay=layer_decay
    )
    others = nn.ModuleDict({name: module for name, module in detector.named_children() if name != "backbone"})
    others["fpn"] = detector.backbone.fpn
    return groups + param_groups_weight_decay(others, weight_decay)


def collate(samples: list) -> tuple[list, list]:
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)


def to_device(target: dict[str, Any], device: str) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in target.items()}


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


def refuse(argument: str, problem: str) -> NoReturn:
    print(f"detect.py: error: argument {argument}: {problem}", file=sys.stderr)
    sys.exit(2)


def at_least(lowest: int):
    def number(text: str) -> int:
        if (value := int(text)) < lowest:
            raise argparse.ArgumentTypeError(f"must be at least {lowest}, got {value}")
        return value

    return number


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--detector", choices=("maskrcnn", "retinanet"), default="maskrcnn", help="default: %(default)s")
    add("--model", default="transnext_micro", help="a TransNeXt of timm's; default: %(default)s, shallow for shapes")
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
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    add("--output", type=Path, metavar="FOLDER", help="default: a new folder runs/detect, runs/detect-1, ...")
    args = parser.parse_args(argv)
    if not timm.models.is_model_in_modules(args.model, ["transnext"]):
        refuse("--model", f"must be a TransNeXt ({', '.join(timm.list_models('transnext*'))}), got {args.model}")
    try:
        torch.empty(0, device=args.device)
    except (AssertionError, RuntimeError) as error:
        refuse("--device", str(error).partition("\n")[0])
    if args.weights and not args.weights.is_file():
        refuse("--weights", f"there is no file {args.weights}")
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
        try:
            load_model(detector, args.weights)
        except Exception as error:
            refuse("--weights", f"{args.weights} holds no weights of this detector ({type(error).__name__}: {error})")
    args.output.mkdir(parents=True, exist_ok=True)
    size = sum(parameter.numel() for parameter in detector.parameters())
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
