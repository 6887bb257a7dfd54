"""Train an image classifier: a small backbone declared here, or any model of timm's.

    python examples/train.py                                # handwritten digits, about two minutes on two cores
    python examples/train.py --model convnext_atto          # a peer, on the same data
    python examples/train.py --model transnext_micro --data cifar100 PATH --epochs 100
    python examples/train.py --model transnext_tiny --data folder /data/imagenet --batch-size 256 --workers 12
    python examples/train.py --resume runs/digits           # go on after Ctrl-C

The output folder gets model.safetensors, curve.png, receptive_field.png and checkpoint.pt. Every random choice follows
from the seed and the position in the run, so a run that was stopped and resumed ends in the same weights: to the bit on
the CPU, on a GPU as far as its kernels repeat themselves.
"""

import argparse
import os
import random
import signal
import sys
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import timm
import torch
from matplotlib.figure import Figure
from safetensors.torch import save_model
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.data import create_dataset, create_transform
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import get_outdir, random_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms import Compose, InterpolationMode, Normalize, RandomAffine
from tqdm import tqdm

from foveal.analysis import draw_receptive_fields, effective_receptive_field
from foveal.blocks import AggregatedAttention, ConvGLU, LengthScaledCosineAttention
from foveal.models import Backbone, Stage

SOURCES = ("digits", "cifar100", "folder")
NOT_SETTINGS = ("device", "workers", "output", "resume")  # what a resumed run may change: where it runs, not what


def small_backbone(img_size: int, **kwargs) -> Backbone:
    """Three stages: fovea and periphery in the first two, global attention in the last."""
    return Backbone(
        [
            Stage(dim=48, depth=2, mixer=partial(AggregatedAttention, num_heads=2, pool_ratio=4), mlp=ConvGLU),
            Stage(dim=96, depth=2, mixer=partial(AggregatedAttention, num_heads=4, pool_ratio=2), mlp=ConvGLU),
            Stage(dim=192, depth=2, mixer=partial(LengthScaledCosineAttention, num_heads=8), mlp=ConvGLU),
        ],
        pretrain_size=img_size,
        **kwargs,
    )


def build_model(args: argparse.Namespace, num_classes: int, in_chans: int) -> nn.Module:
    kwargs: dict[str, Any] = {"num_classes": num_classes, "in_chans": in_chans}
    if args.drop_path:
        kwargs["drop_path_rate"] = args.drop_path
    if args.model is None:
        return small_backbone(args.img_size, **kwargs)
    if not timm.is_model(args.model):
        refuse("--model", f"timm knows no model {args.model!r}; timm.list_models() names those it does")
    if timm.models.is_model_in_modules(args.model, ["transnext"]):
        kwargs["pretrain_size"] = args.img_size
    elif getattr(timm.get_pretrained_cfg(args.model), "fixed_input_size", False):
        kwargs["img_size"] = args.img_size
    try:
        return timm.create_model(args.model, **kwargs)
    except TypeError as error:
        if "drop_path_rate" not in str(error):
            raise
        refuse("--drop-path", f"{args.model} has no stochastic depth; pass --drop-path 0")


class Digits(Dataset):
    """The 1797 handwritten digits of scikit-learn, 8 x 8 pixels, a fifth of them (stratified, fixed) held out."""

    def __init__(self, split: str, img_size: int):
        images, labels = load_digits(return_X_y=True)
        parts = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=0)
        images, labels = parts[0::2] if split == "train" else parts[1::2]
        small = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
        self.images = nn.functional.interpolate(small, size=(img_size, img_size), mode="bilinear")
        self.labels = labels.tolist()
        normalize = Normalize(mean=0.305, std=0.376)
        jitter = RandomAffine(10, translate=(0.1, 0.1), scale=(0.9, 1.1), interpolation=InterpolationMode.BILINEAR)
        self.transform = Compose([jitter, normalize]) if split == "train" else normalize

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), self.labels[index]


def open_data(args: argparse.Namespace) -> tuple[Dataset, Dataset, int, int]:
    """The training set, the held-out set, the number of classes and of colours."""
    name, *path = args.data
    if name == "digits":
        return Digits("train", args.img_size), Digits("test", args.img_size), 10, 1
    root = Path(*path)
    size = (3, args.img_size, args.img_size)
    if name == "cifar100":
        try:
            train, test = (create_dataset("torch/cifar100", root, split) for split in ("train", "validation"))
        except RuntimeError as error:
            refuse("--data", f"no CIFAR-100 in {root}, the folder that holds cifar-100-python/ ({error})")
        train.transform = create_transform(size, is_training=True, scale=(0.4, 1.0), interpolation="bicubic")
        test.transform = create_transform(size, crop_pct=1.0, interpolation="bicubic")
        return train, test, 100, 3
    for split in ("train", "val"):
        if not (root / split).is_dir():
            refuse("--data", f"no folder {root / split}; its sub-folders must hold the images, one for each class")
    train, test = (create_dataset("", root / split, search_split=False) for split in ("train", "val"))
    classes, others = train.reader.class_to_idx, test.reader.class_to_idx
    if classes != others:
        refuse("--data", f"train and val must hold the same classes, they differ in {sorted({*classes} ^ {*others})}")
    train.transform = create_transform(size, is_training=True, interpolation="bicubic")
    test.transform = create_transform(size, interpolation="bicubic")
    return train, test, len(classes), 3


class Augmented(Dataset):
    """A data set whose random transforms follow from the seed, the epoch and the image, whoever loads it when."""

    def __init__(self, dataset: Dataset, seed: int, epoch: int):
        self.dataset, self.seed, self.epoch = dataset, seed, epoch

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        random_seed(derived_seed(self.seed, "image", self.epoch, index))
        return self.dataset[index]


def derived_seed(*position: Any) -> int:
    return random.Random(str(position)).getrandbits(32)


def ignore_interrupts(_: int) -> None:
    """Ctrl-C reaches worker processes too; only the main one shall act on it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def no_sums() -> Tensor:
    """What a running mean needs: the sums of losses, hits and images."""
    return torch.zeros(3, dtype=torch.float64)


def means(sums: Tensor) -> list[float]:
    """Mean loss and accuracy."""
    return (sums[:2] / sums[2]).tolist()


def measure(model: nn.Module, loss_fn: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of a batch, and its part of the sums."""
    logits = model(images)
    loss = loss_fn(logits, labels)
    hits = (logits.argmax(dim=1) == labels).sum()
    return loss, torch.tensor([loss.item() * len(labels), hits.item(), len(labels)], dtype=torch.float64)


@dataclass
class Run:
    """All that a run has reached: what a checkpoint holds."""

    settings: dict[str, Any]
    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: int = 0
    totals: Tensor = field(default_factory=no_sums)  # of this epoch so far
    history: list[dict[str, float]] = field(default_factory=list)  # one entry for each epoch

    def save(self, path: Path) -> None:
        """Write a checkpoint. The old one stays whole until the new one is."""
        state = {name: getattr(self, name) for name in ("settings", "step", "totals", "history")}
        state |= {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        unfinished = path.with_suffix(".tmp")
        torch.save(state, unfinished)
        os.replace(unfinished, path)

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.totals, self.history = state["step"], state["totals"], state["history"]


class Stopped(KeyboardInterrupt):
    """Ctrl-C, as it is raised between two steps."""


class Interrupt:
    """Ctrl-C waits for the end of the step in progress; a second Ctrl-C does not."""

    def __init__(self):
        self.asked = False
        signal.signal(signal.SIGINT, self)

    def __call__(self, *_: Any) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def check(self) -> None:
        if self.asked:
            raise Stopped


def train(run: Run, args: argparse.Namespace, train_set: Dataset, test_set: Dataset, interrupt: Interrupt) -> None:
    """Train from where the run stands to its end, with a checkpoint after every epoch."""
    steps = len(train_set) // args.batch_size
    scheduler = CosineLRScheduler(
        run.optimizer,
        t_initial=args.epochs * steps,
        lr_min=args.lr / 100,
        warmup_t=args.epochs * steps // 10,
        warmup_lr_init=args.lr / 1000,
        t_in_epochs=False,
    )
    load = partial(DataLoader, batch_size=args.batch_size, num_workers=args.workers, worker_init_fn=ignore_interrupts)
    loss_fn = nn.CrossEntropyLoss(label_smoothing=args.label_smoothing)
    images_done, images_in_all = run.step * args.batch_size, args.epochs * steps * args.batch_size
    with tqdm(initial=images_done, total=images_in_all, unit=" images", dynamic_ncols=True) as bar:
        for epoch in range(len(run.history), args.epochs):
            generator = torch.Generator().manual_seed(derived_seed(args.seed, "order", epoch))
            order = torch.randperm(len(train_set), generator=generator)[: steps * args.batch_size]
            ahead = order[(run.step - epoch * steps) * args.batch_size :].tolist()
            run.model.train()
            for images, labels in load(Subset(Augmented(train_set, args.seed, epoch), ahead)):
                interrupt.check()
                random_seed(derived_seed(args.seed, "step", run.step))
                scheduler.step_update(run.step)
                loss, sums = measure(run.model, loss_fn, images.to(args.device), labels.to(args.device))
                if not loss.isfinite():
                    sys.exit(f"train.py: the loss is {loss.item()} at step {run.step}; a smaller --lr may help")
                run.optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
                run.optimizer.step()
                run.step += 1
                run.totals = run.totals + sums
                mean_loss, accuracy = means(run.totals)
                bar.set_postfix(epoch=epoch + 1, loss=f"{mean_loss:.3f}", accuracy=f"{accuracy:.1%}", refresh=False)
                bar.update(len(images))

            tested = no_sums()
            run.model.eval()
            with torch.inference_mode():
                for images, labels in load(test_set):
                    interrupt.check()
                    tested += measure(run.model, loss_fn, images.to(args.device), labels.to(args.device))[1]
            (loss, accuracy), (test_loss, test_accuracy) = means(run.totals), means(tested)
            bar.write(
                f"epoch {epoch + 1}/{args.epochs}: training loss {loss:.3f}, accuracy {accuracy:.1%}; "
                f"held-out loss {test_loss:.3f}, accuracy {test_accuracy:.2%}"
            )
            run.history.append(
                {"loss": loss, "accuracy": accuracy, "test_loss": test_loss, "test_accuracy": test_accuracy}
            )
            run.totals = no_sums()
            run.save(args.output / "checkpoint.pt")


def draw_curve(history: list[dict[str, float]], smoothing: float, path: Path) -> None:
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    epochs = range(1, len(history) + 1)
    titles = {"loss": f"loss (labels smoothed by {smoothing})", "accuracy": "accuracy"}
    for panel, (name, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        panel.plot(epochs, [entry[name] for entry in history], ".-", label="training images, augmented")
        panel.plot(epochs, [entry[f"test_{name}"] for entry in history], ".-", label="held-out images")
        panel.set(xlabel="epoch", ylabel=title, xlim=(0, len(history) + 1))
        panel.grid(alpha=0.3)
        panel.legend()
    figure.suptitle(f"Held-out accuracy after the last epoch: {history[-1]['test_accuracy']:.2%}")
    figure.savefig(path, dpi=120)


def write_results(run: Run, args: argparse.Namespace, test_set: Dataset) -> None:
    """Weights, curve and the receptive fields of up to four stages, averaged over 64 held-out images."""
    save_model(run.model, str(args.output / "model.safetensors"))
    draw_curve(run.history, args.label_smoothing, args.output / "curve.png")
    spread = Subset(test_set, range(0, len(test_set), max(1, len(test_set) // 64)))
    batches = [images.to(args.device) for images, _ in islice(DataLoader(spread, batch_size=8), 8)]
    count = len(run.model.feature_info)
    fields = {
        f"stage {stage + 1} of {count}": effective_receptive_field(run.model, batches, stage=stage)
        for stage in range(max(0, count - 4), count)
    }
    draw_receptive_fields(fields, args.output / "receptive_field.png")


def refuse(argument: str, problem: str) -> NoReturn:
    print(f"train.py: error: argument {argument}: {problem}", file=sys.stderr)
    sys.exit(2)


def positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def parse_args(argv: list[str] | None) -> tuple[argparse.Namespace, dict[str, Any] | None]:
    """The arguments, and the checkpoint to go on from: a resumed run takes its settings from there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", metavar="NAME", help="a model of timm's; default: the small backbone declared in this file")
    add(
        "--data",
        nargs="+",
        default=["digits"],
        metavar=("NAME", "PATH"),
        help="digits (the default, scikit-learn's); cifar100 PATH, the folder that holds cifar-100-python; "
        "or folder PATH, where train/ and val/ hold a folder of images for each class",
    )
    add("--img-size", type=positive, help="side of the images in pixels; default: 32, for a folder 224")
    add("--epochs", type=positive, default=15, help="default: %(default)s")
    add("--batch-size", type=positive, default=64, help="default: %(default)s")
    add("--lr", type=float, default=2e-3, help="AdamW's learning rate after warm-up; default: %(default)s")
    add("--weight-decay", type=float, default=0.05, help="default: %(default)s")
    add("--drop-path", type=float, default=0.1, help="stochastic depth of the last block; default: %(default)s")
    add("--label-smoothing", type=float, default=0.1, help="default: %(default)s")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--workers", type=int, help="processes that load images; default: 0 for digits, else 4")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    add("--output", type=Path, metavar="FOLDER", help="default: a new folder runs/DATA, runs/DATA-1, ...")
    add("--resume", type=Path, metavar="FOLDER", help="go on with the run in that folder, with its settings")

    args, checkpoint = parser.parse_args(argv), None
    if args.resume:
        try:
            checkpoint = torch.load(args.resume / "checkpoint.pt", map_location="cpu", weights_only=True)
        except FileNotFoundError:
            refuse("--resume", f"{args.resume} holds no checkpoint.pt")
        settings = {**checkpoint["settings"], "output": args.resume}
        parser.set_defaults(**settings)
        args = parser.parse_args(argv)
        for name, value in settings.items():
            if (given := getattr(args, name)) != value:
                refuse(f"--{name.replace('_', '-')}", f"the run to resume has {value}, got {given}")

    source, *path = args.data
    if source not in SOURCES or len(path) != (source != "digits"):
        refuse("--data", f"expected digits, cifar100 PATH or folder PATH, got {' '.join(args.data)}")
    try:
        torch.empty(0, device=args.device)
    except (AssertionError, RuntimeError) as error:
        refuse("--device", str(error).partition("\n")[0])
    args.img_size = args.img_size or (224 if source == "folder" else 32)
    args.workers = (0 if source == "digits" else 4) if args.workers is None else args.workers
    if not args.resume:
        args.output = args.output or Path(get_outdir("runs", source, inc=True))
        if (args.output / "checkpoint.pt").exists():
            refuse("--output", f"{args.output} holds a run already; go on with it by --resume {args.output}")
    return args, checkpoint


def main(argv: list[str] | None = None) -> int:
    args, checkpoint = parse_args(argv)
    interrupt = Interrupt()
    train_set, test_set, num_classes, in_chans = open_data(args)
    if args.batch_size > len(train_set):
        refuse("--batch-size", f"must be at most the number of training images, {len(train_set)}")
    random_seed(args.seed)
    model = build_model(args, num_classes, in_chans).to(args.device)
    optimizer = create_optimizer_v2(model, "adamw", lr=args.lr, weight_decay=args.weight_decay)
    settings = {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS}
    run = Run(settings, model, optimizer)
    if checkpoint:
        run.load(checkpoint)
    args.output.mkdir(parents=True, exist_ok=True)
    run.save(args.output / "checkpoint.pt")
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{args.model or 'small backbone'}, {size:,} parameters, {len(train_set)} images, into {args.output}")
    try:
        train(run, args, train_set, test_set, interrupt)
    except Stopped:
        run.save(args.output / "checkpoint.pt")
        print(f"Stopped after step {run.step}. Go on with: python {sys.argv[0]} --resume {args.output}")
        return 130
    write_results(run, args, test_set)
    print(f"Held-out accuracy {run.history[-1]['test_accuracy']:.2%}. Weights and pictures are in {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
