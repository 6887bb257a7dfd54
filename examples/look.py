"""Look into a model: what its attention sees on an image, its receptive fields, what each block costs.

    python examples/look.py                                # a photograph of scikit-learn's, weights from the hub
    python examples/look.py photo.jpg --checkpoint transnext_tiny_224_1k.pth --query 0.3 0.5 --query 0.9 0.1
    python examples/look.py photos/ --size 384 --beside convnext_tiny swin_tiny_patch4_window7_224
    python examples/look.py photo.jpg --pictures attention --block stages.1.blocks.0 --heads 0 1 2
    python examples/look.py --digits runs/digits/model.safetensors        # what examples/train.py trained

OUTPUT gets attention_BLOCK.png, receptive_fields.png and profile.png. Without trained weights only the last is drawn,
unless --random-weights asks for all.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

from common.refusals import brief, refuse, refuse_missing

if __name__ == "__main__":
    refuse_missing("--checkpoint", "--digits")

import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torchvision.transforms import v2
from tqdm import tqdm

from common.arguments import add_device, add_import, check_device, positive
from common.images import find_images, read_image
from common.models import check_model, import_modules, load_model, load_weights, sized
from foveal import analysis
from training.digits import Digits
from training.model import small_backbone

PICTURES = ("attention", "fields", "profile")
QUERIES = [(0.45, 0.45), (0.75, 0.2), (0.0, 0.99)]  # the last in a corner, where the window is cut
DIGITS_SIZE = 32  # at which examples/train.py trains


class Subject(NamedTuple):
    """A model, and how it wants its images."""

    name: str
    model: nn.Module
    trained: bool
    normalize: v2.Normalize


def open_model(name: str, argument: str, args: argparse.Namespace, checkpoint: Path | None = None) -> Subject:
    """A model of timm's, with the weights of a checkpoint, of the hub, or none."""
    check_model(name, argument)
    kwargs, trained = sized(name, args.size), not args.random_weights
    if args.random_weights or checkpoint:
        model = load_model(name, checkpoint, args.random_weights, argument, **kwargs)
    else:
        try:
            model = timm.create_model(name, pretrained=True, **kwargs)
        except Exception as error:  # of whatever stands between us and the hub
            print(f"No weights of {name} from the hub ({brief(error)}).", file=sys.stderr)
            model, trained = timm.create_model(name, **kwargs), False
    config = resolve_model_data_config(model)
    return Subject(name, model.eval().to(args.device), trained, v2.Normalize(config["mean"], config["std"]))


def open_images(path: Path | None) -> dict[str, Image.Image]:
    if path is None:
        return {"china.jpg": Image.fromarray(load_sample_image("china.jpg"))}
    return {file.name: read_image(file) for file in find_images(path)[:64]}


def prepare(images: dict[str, Image.Image], size: int, crops: int) -> tuple[Tensor, Tensor]:
    """The centre square of the first image, and random crops of all of them, in [0, 1]: ``(3, S, S)``, ``(N, ...)``."""
    to_tensor = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    first, *_ = pictures = [to_tensor(image) for image in images.values()]
    centre = v2.Compose([v2.Resize(size, antialias=True), v2.CenterCrop(size)])
    crop = v2.Compose([v2.RandomResizedCrop(size, scale=(0.2, 1.0), antialias=True), v2.RandomHorizontalFlip()])
    return centre(first), torch.stack([crop(pictures[i % len(pictures)]) for i in range(crops)])


def draw_attention(subject: Subject, image: Tensor, args: argparse.Namespace) -> list[Path]:
    """A picture for each block."""
    names = analysis.attention_blocks(subject.model)
    if args.block is None:  # the last of each stage
        names = list({name.partition(".blocks.")[0]: name.removesuffix(".mixer") for name in names}.values())
    written = []
    for name in args.block or names:
        try:
            weights = analysis.attention_weights(subject.model, subject.normalize(image)[None].to(args.device), name)
        except ValueError as error:
            refuse("--block", str(error))
        grid = weights.pool.shape[1:3]
        cells = [(int(y * grid[0]), int(x * grid[1])) for y, x in args.query or QUERIES]
        written.append(args.output / f"attention_{name}.png")
        title = f"{describe(subject)}, {name}: attention on a map of {grid[0]} x {grid[1]} cells"
        try:
            analysis.draw_attention_maps(image, weights, cells, written[-1], heads=args.heads, title=title)
        except ValueError as error:
            refuse("--heads", f"of {name}: {error}")
    return written


def draw_fields(subjects: list[Subject], images: Tensor, args: argparse.Namespace) -> list[Path]:
    """A row for each model, with its last four stages."""
    fields: dict[str, dict[str, Tensor]] = {}
    counts = [len(subject.model.feature_info) for subject in subjects]
    with tqdm(total=sum(min(4, count) for count in counts), unit=" fields") as bar:
        for subject, count in zip(subjects, counts, strict=True):
            batches = [batch.to(args.device) for batch in subject.normalize(images).split(8)]
            row = fields[describe(subject)] = {}
            for stage in range(max(0, count - 4), count):
                row[f"stage {stage + 1} of {count}"] = analysis.effective_receptive_field(
                    subject.model, batches, stage=stage
                )
                bar.update()
    analysis.draw_receptive_fields(fields, args.output / "receptive_fields.png")
    return [args.output / "receptive_fields.png"]


def draw_costs(subject: Subject, image: Tensor, args: argparse.Namespace) -> list[Path]:
    costs = analysis.profile_blocks(subject.model, subject.normalize(image)[None].to(args.device))
    title = f"{subject.name}: the cost of one image of {image.shape[1]} x {image.shape[2]} pixels"
    analysis.draw_profile(costs, args.output / "profile.png", title=title)
    return [args.output / "profile.png"]


def describe(subject: Subject) -> str:
    return subject.name if subject.trained else f"{subject.name}, untrained"


def fraction(text: str) -> float:
    if not 0 <= (number := float(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 0 and less than 1, got {text}")
    return number


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("images", type=Path, nargs="?", help="an image file, or a folder of them; default: scikit-learn's china.jpg")
    add("--model", default="transnext_tiny", metavar="NAME", help="a model of timm's; default: %(default)s")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--checkpoint", type=Path, help="local weights: an official .pth, or foveal's .safetensors")
    weights.add_argument("--random-weights", action="store_true", help="do without weights: shows the architecture")
    weights.add_argument("--digits", type=Path, metavar="FILE", help="weights of the backbone of examples/train.py")
    add("--beside", nargs="+", default=[], metavar="NAME", help="models of timm's, for the receptive fields")
    add("--pictures", nargs="+", choices=PICTURES, default=list(PICTURES), help="which ones; default: all")
    add("--block", nargs="+", metavar="NAME", help="blocks whose attention to draw; default: the last of each stage")
    add("--query", nargs=2, type=fraction, action="append", metavar=("Y", "X"), help="fractions of height and width")
    add("--heads", nargs="+", type=int, metavar="HEAD", help="heads, a row each; default: the average of all")
    add("--size", type=positive, help="side of the images in pixels; default: the model's own")
    add("--crops", type=positive, default=32, help="of the images, for the receptive fields; default: %(default)s")
    add_import(parser)
    add_device(parser)
    add("--output", type=Path, default=Path("runs/look"), metavar="FOLDER", help="default: %(default)s")
    args = parser.parse_args(argv)
    if args.digits and (args.images or args.beside):
        refuse("--digits", "looks at digits, and takes neither images nor models beside")
    check_device(args.device)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    torch.manual_seed(0)
    import_modules(args)
    if args.digits:
        model = small_backbone(DIGITS_SIZE, num_classes=10, in_chans=1)
        digits = Digits("test", args.size or DIGITS_SIZE)
        load_weights(model, args.digits, "the backbone of examples/train.py", "--digits")
        subject = Subject("digits", model.eval().to(args.device), True, digits.transform)
        image, crops = digits.images[0], digits.images[: args.crops]
    else:
        photographs = open_images(args.images)
        subject = open_model(args.model, "--model", args, args.checkpoint)
        size = args.size or resolve_model_data_config(subject.model)["input_size"][-1]
        image, crops = prepare(photographs, size, args.crops)
    pictures = args.pictures
    if not (subject.trained or args.random_weights):
        pictures = [picture for picture in pictures if picture == "profile"]
        print("Drawing the profile alone; for more, pass --checkpoint or --random-weights.", file=sys.stderr)
    args.output.mkdir(parents=True, exist_ok=True)
    written = []
    if "attention" in pictures:
        written += draw_attention(subject, image, args)
    if "fields" in pictures:
        others = [open_model(name, "--beside", args) for name in args.beside]
        written += draw_fields([subject, *(o for o in others if o.trained or args.random_weights)], crops, args)
    if "profile" in pictures:
        written += draw_costs(subject, image, args)
    print("\n".join(map(str, written)))


if __name__ == "__main__":
    main()
