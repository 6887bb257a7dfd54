"""The command line. A value that no option gives comes from the recipe, or, in a resumed run, from its checkpoint."""

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from timm.utils import get_outdir

from common.arguments import add_device, add_import, check_device, positive
from common.models import check_model, import_modules
from common.refusals import brief, refuse
from training.data import SPLITS
from training.processes import from_first, own_device, world_size
from training.recipes import RECIPES

EXPECTED = "digits, cifar100 PATH, folder PATH, shards PATH or hfds/NAME"
# What a resumed run may change: where it runs and what it tells, not what it computes.
NOT_SETTINGS = (
    *("device", "engine", "compile", "grad_checkpointing", "workers"),
    *("output", "resume", "log_every", "save_every", "tensorboard"),
)


def option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def optional(kind: type) -> Any:
    """A type that takes the word none too."""

    def read(text: str) -> Any:
        return None if text == "none" else kind(text)

    read.__name__ = kind.__name__
    return read


def first_parser() -> argparse.ArgumentParser:
    """The options that say where the defaults of the others come from."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(
        "--data",
        nargs="+",
        default=["digits"],
        metavar=("NAME", "PATH"),
        help="digits (the default, scikit-learn's); cifar100 PATH, the folder that holds cifar-100-python; "
        "folder PATH, where train/ and val/ hold a folder of images for each class; "
        "shards PATH, WebDataset's tar files with train and val in their names or those of their folders; "
        "hfds/NAME [CACHE], a data set of Hugging Face's, from its hub or a local folder",
    )
    parser.add_argument("--recipe", choices=RECIPES, help="default: that of the data, or photos")
    parser.add_argument("--resume", type=Path, metavar="FOLDER", help="go on with the run there, with its settings")
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="default: a new folder runs/DATA, runs/DATA-1, ..."
    )
    return parser


def full_parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description,
        parents=[first_parser()],
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", metavar="NAME", help="a model of timm's; default: the small backbone declared in training/model.py")
    add_import(parser)
    add(
        "--weights",
        metavar="FILE",
        help="start from these weights of --model, or, with the word hub, from published ones",
    )
    add("--splits", nargs=2, metavar=("TRAIN", "VAL"), help="default: train val; for hfds train validation")
    add("--seed", type=int, default=0, help="default: %(default)s")

    add = parser.add_argument_group("recipe (none turns off what can be)").add_argument
    add("--img-size", type=positive, help="side of the images in pixels; default: %(default)s")
    add("--pretrain-size", type=optional(positive), help="side the position bias is made for; default: the image size")
    add("--epochs", type=positive, help="default: %(default)s")
    add("--batch-size", type=positive, help="images of a step, of all processes together; default: %(default)s")
    add("--lr", type=float, help="AdamW's learning rate after warm-up; default: %(default)s")
    add("--schedule", choices=("cosine", "constant"), help="what follows the warm-up; default: %(default)s")
    add("--min-lr", type=float, help="where the cosine ends; default: %(default)s")
    add("--warmup-epochs", type=float, help="default: %(default)s")
    add("--warmup-lr", type=float, help="where the warm-up starts; default: %(default)s")
    add("--weight-decay", type=float, help="default: %(default)s")
    add(
        "--layer-decay", type=optional(float), help="learning rate of a layer by that of the next; default: %(default)s"
    )
    add("--clip-norm", type=optional(float), help="longest gradient; default: %(default)s")
    add("--drop-path", type=float, help="stochastic depth of the last block; default: %(default)s")
    add("--label-smoothing", type=float, help="default: %(default)s")
    add("--mixup", type=float, help="its alpha; default: %(default)s")
    add("--cutmix", type=float, help="its alpha; with both, each takes half of the batches; default: %(default)s")
    add("--auto-augment", type=optional(str), help="timm's notation, as rand-m9-mstd0.5-inc1; default: %(default)s")
    add("--color-jitter", type=optional(float), help="where there is no --auto-augment; default: %(default)s")
    add("--random-erasing", type=float, help="probability; default: %(default)s")
    add("--crop-scale", type=float, help="smallest part of an image to train on; default: %(default)s")
    add("--crop-pct", type=float, help="side of the part to test on, 1 the whole; default: %(default)s")
    add("--repeats", type=positive, help="draw each image so often, and fewer images; default: %(default)s")

    add = parser.add_argument_group("how it runs").add_argument
    add("--micro-batch", type=positive, help="images a process takes at once; default: its part of the batch")
    add("--precision", choices=("float32", "bfloat16", "float16"), default="float32", help="default: %(default)s")
    add("--grad-checkpointing", action="store_true", help="compute activations twice instead of keeping them")
    add("--compile", action="store_true", help="torch.compile")
    add("--engine", choices=("ddp", "fsdp2"), default="ddp", help="of several processes; default: %(default)s")
    add("--workers", type=int, help="processes that load images; default: 0 for digits, else 4")
    add_device(parser)
    add("--log-every", type=positive, help="steps from a log line to the next; default: 1 on a CPU, else 20")
    add("--save-every", type=positive, help="steps from a checkpoint to the next; default: only after each epoch")
    add("--tensorboard", action="store_true", help="write the log for TensorBoard too")
    return parser


def parse_args(argv: list[str] | None, description: str | None = None) -> tuple[argparse.Namespace, dict | None]:
    """The arguments, and the checkpoint to go on from."""
    first = first_parser().parse_known_args(argv)[0]
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and not first.resume:  # torchrun has started it again
        if not first.output:
            refuse("--output", "must be given for a restarted run to find what it has reached")
        first.resume = first.output if (first.output / "checkpoint.pt").exists() else None
    parser, checkpoint = full_parser(description), None
    if first.resume:
        checkpoint = read_checkpoint(first.resume)
        parser.set_defaults(**checkpoint["settings"], output=first.resume, resume=first.resume)
    else:
        recipe = first.recipe or (first.data[0] if first.data[0] in RECIPES else "photos")
        parser.set_defaults(**RECIPES[recipe], recipe=recipe)
    args = parser.parse_args(argv)
    if checkpoint:
        same_settings(args, {**checkpoint["settings"], "output": first.resume})
    import_modules(args)
    settle_data(args)
    settle_recipe(args)
    settle_machine(args)
    if not args.resume:
        args.output = from_first(lambda: new_output(args))
    return args, checkpoint


def read_checkpoint(folder: Path) -> dict[str, Any]:
    try:
        return torch.load(folder / "checkpoint.pt", map_location="cpu", mmap=True, weights_only=True)
    except FileNotFoundError:
        refuse("--resume", f"{folder} holds no checkpoint.pt")
    except Exception as error:  # cut off, or something else
        refuse("--resume", f"{folder / 'checkpoint.pt'} is no checkpoint of a run ({brief(error)})")


def same_settings(args: argparse.Namespace, settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        if (given := getattr(args, name)) != value and name != "micro_batch":
            refuse(option(name), f"the run to resume has {value}, got {given}")


def settle_data(args: argparse.Namespace) -> None:
    source, *path = args.data
    kind, _, hub_name = source.partition("/")
    if source == "digits":
        known = not path
    elif kind == "hfds":
        known = hub_name and len(path) <= 1
    else:
        known = source in ("cifar100", "folder", "shards") and len(path) == 1
    if not known:
        refuse("--data", f"expected {EXPECTED}, got {' '.join(args.data)}")
    for name in ("auto_augment", "color_jitter", "random_erasing", "crop_scale", "crop_pct"):
        if source == "digits" and (given := getattr(args, name)):
            refuse(option(name), f"digits have an augmentation of their own, got {given}")
    if args.splits and kind not in SPLITS:
        refuse("--splits", f"{source} has its own, got {' '.join(args.splits)}")
    args.splits = args.splits or SPLITS.get(kind)


def settle_recipe(args: argparse.Namespace) -> None:
    if args.model:
        check_model(args.model)
    if args.weights and not args.model:
        refuse("--weights", f"needs a --model that they belong to, got {args.weights}")
    if isinstance(args.drop_path, dict):
        rates, name = args.drop_path, str(args.model).partition(".")[0]
        if name not in rates:
            refuse("--drop-path", f"the recipe has one for {', '.join(rates)}; pass that of {args.model or 'yours'}")
        args.drop_path = rates[name]
    for name in ("min_lr", "warmup_lr"):
        if getattr(args, name) > args.lr:
            refuse(option(name), f"must be at most --lr {args.lr}, got {getattr(args, name)}")


def settle_machine(args: argparse.Namespace) -> None:
    args.device = check_device(args.device, own_device)
    args.log_every = args.log_every or (1 if args.device.type == "cpu" else 20)
    args.workers = (0 if args.data == ["digits"] else 4) if args.workers is None else args.workers
    args.micro_batch = args.micro_batch or max(1, args.batch_size // world_size())
    if args.batch_size % (args.micro_batch * world_size()):
        multiple = f"a multiple of {args.micro_batch} x {world_size()} processes"
        refuse("--micro-batch", f"--batch-size {args.batch_size} must be {multiple}")
    if (args.mixup or args.cutmix) and args.micro_batch % 2:
        refuse("--micro-batch", f"--mixup and --cutmix pair images, so it must be even, got {args.micro_batch}")


def new_output(args: argparse.Namespace) -> Path:
    output = args.output or Path(get_outdir("runs", args.data[0].replace("/", "-"), inc=True))
    if (output / "checkpoint.pt").exists():
        refuse("--output", f"{output} holds a run already; go on with it by --resume {output}")
    return output
