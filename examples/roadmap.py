"""The paper's roadmap (table 2, steps 3 to 8), scaled down to what one core trains in a coffee break.

    python examples/roadmap.py                          # three seeds of six models, about 25 minutes of one core
    python examples/roadmap.py --seeds 0 1 2 3 4        # two more seeds: what is there already is not run again
    python examples/roadmap.py --output docs/roadmap    # how the page in docs/ was made

It trains the six models on few of scikit-learn's handwritten digits and tests them on the others. Every run that is
finished is kept: after Ctrl-C the same command goes on. OUTPUT.json gets the numbers, OUTPUT.md the table.
"""

import argparse
import json
import platform
import shlex
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import timm
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torchvision.transforms.v2 import InterpolationMode, RandomAffine
from tqdm import tqdm

import foveal
from common.arguments import positive
from common.files import write_text
from common.refusals import refuse
from foveal.analysis import count_flops, count_parameters
from foveal.blocks import (
    GLU,
    ConvFFN,
    ConvGLU,
    LengthScaledCosineAttention,
    OverlapPatchEmbed,
    PixelFocusedAttention,
    SpatialReductionAttention,
)
from foveal.models import Backbone, Stage

DIMS, HEADS, RATIOS = (48, 96, 192), (2, 4, 8), (4, 2, 1)  # heads of 24 channels; 4 x 4 pooled cells at 32 x 32 pixels
TEST_BATCH = 128
Factory = Callable[..., nn.Module]


def reduction(heads: int, ratio: int) -> Factory:
    return partial(SpatialReductionAttention, num_heads=heads, sr_ratio=ratio)


def focused(heads: int, ratio: int, query_embedding: bool = False, positional_attention: bool = False) -> Factory:
    """Pixel-focused cosine attention; in the last stage, which nothing pools, global attention of its kind."""
    if ratio == 1:
        return partial(LengthScaledCosineAttention, num_heads=heads, query_embedding=query_embedding)
    return partial(
        PixelFocusedAttention,
        num_heads=heads,
        pool_ratio=ratio,
        cosine=True,
        length_scaled=True,
        query_embedding=query_embedding,
        positional_attention=positional_attention,
    )


class Step(NamedTuple):
    number: int
    change: str
    mixer: Callable[[int, int], Factory]
    mlp: Factory


ROADMAP = (
    Step(3, "PVTv2's blocks, heads of 24 channels", reduction, ConvFFN),
    Step(4, "ConvFFN becomes GLU", reduction, GLU),
    Step(5, "GLU becomes ConvGLU", reduction, ConvGLU),
    Step(6, "spatial reduction becomes pixel-focused attention", focused, ConvGLU),
    Step(7, "with positional attention", partial(focused, positional_attention=True), ConvGLU),
    Step(8, "with query embedding", partial(focused, positional_attention=True, query_embedding=True), ConvGLU),
)


def build(step: Step, img_size: int) -> Backbone:
    """Three stages of two blocks, on maps of a half, a quarter and an eighth of the image's side."""
    stem = partial(OverlapPatchEmbed, patch_size=3, stride=2)
    stages = [
        Stage(dim=dim, depth=2, mixer=step.mixer(heads, ratio), mlp=step.mlp, downsample=stem)
        for dim, heads, ratio in zip(DIMS, HEADS, RATIOS, strict=True)
    ]
    return Backbone(stages, in_chans=1, num_classes=10, pretrain_size=img_size, drop_path_rate=0.1)


class Split(NamedTuple):
    """Images ``(N, 1, S, S)`` of zero mean and unit deviation, labels ``(N,)``, drawn by a seed."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def draw_split(seed: int, train_images: int, img_size: int) -> Split:
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images, labels, train_size=train_images, stratify=labels, random_state=seed)
    small, test_small = (torch.tensor(part, dtype=torch.float32).view(-1, 1, 8, 8) / 16 for part in parts[:2])
    larger = partial(nn.functional.interpolate, size=(img_size, img_size), mode="bilinear")
    large = larger(small)
    deviation, average = torch.std_mean(large)
    labels, test_labels = map(torch.tensor, parts[2:])
    return Split((large - average) / deviation, labels, (larger(test_small) - average) / deviation, test_labels)


def train(step: Step, seed: int, settings: dict[str, Any], bar: tqdm) -> float:
    """Train a model from scratch; its accuracy on the held-out images."""
    split = draw_split(seed, settings["train_images"], settings["img_size"])
    torch.manual_seed(seed)
    model = build(step, settings["img_size"])
    torch.manual_seed(seed)  # the models drew unlike numbers of weights; order and augmentation are the same for all
    order = torch.cat([torch.randperm(len(split.labels)) for _ in range(settings["epochs"])])
    batches = order.split(settings["batch_size"])
    optimizer = create_optimizer_v2(model, "adamw", lr=settings["lr"], weight_decay=0.05)
    scheduler = CosineLRScheduler(
        optimizer,
        t_initial=len(batches),
        lr_min=settings["lr"] / 100,
        warmup_t=len(batches) // 10,
        warmup_lr_init=settings["lr"] / 1000,
        t_in_epochs=False,
    )
    background = split.images.min().item()
    jitter = RandomAffine(10, (0.1, 0.1), (0.9, 1.1), interpolation=InterpolationMode.BILINEAR, fill=background)
    loss_fn = nn.CrossEntropyLoss(label_smoothing=0.1)
    model.train()
    for i, chosen in enumerate(batches):
        scheduler.step_update(i)
        images = torch.stack([jitter(image) for image in split.images[chosen]])
        optimizer.zero_grad()
        loss_fn(model(images), split.labels[chosen]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        bar.update(len(chosen))
    model.eval()
    with torch.inference_mode():
        predicted = torch.cat([model(images).argmax(dim=1) for images in split.test_images.split(TEST_BATCH)])
    return (predicted == split.test_labels).double().mean().item()


def cost(step: Step, img_size: int) -> tuple[int, int]:
    """Parameters, and the multiply-adds of an image."""
    model = build(step, img_size)
    return count_parameters(model), count_flops(model, torch.zeros(1, 1, img_size, img_size)) // 2


def made_with() -> dict[str, str]:
    versions = {module.__name__: module.__version__ for module in (foveal, torch, timm)}
    capability = torch.backends.cpu.get_cpu_capability()
    machine = f"{platform.system()} {platform.machine()}, {capability}, {torch.get_num_threads()} thread(s)"
    return {"python": platform.python_version(), **versions, "machine": machine}


def complete(report: dict[str, Any], seeds: list[int], write: Callable[[], None]) -> None:
    """Run what the report lacks, seed by seed, and keep each result as soon as it is there."""
    done = {(run["step"], run["seed"]) for run in report["runs"]}
    ahead = [(step, seed) for seed in seeds for step in ROADMAP if (step.number, seed) not in done]
    settings = report["settings"]
    images = settings["epochs"] * settings["train_images"]
    with tqdm(total=len(ahead) * images, unit=" images", dynamic_ncols=True, disable=not ahead) as bar:
        for step, seed in ahead:
            bar.set_description(f"step {step.number}, seed {seed}")
            start = time.process_time()
            accuracy = train(step, seed, settings, bar)
            seconds = round(time.process_time() - start, 1)
            report["runs"].append({"step": step.number, "seed": seed, "accuracy": accuracy, "seconds": seconds})
            write()
            bar.write(f"step {step.number}, seed {seed}: held-out accuracy {accuracy:.2%} ({seconds:.0f} s)")


def spread(values: list[float], form: str = "{:.2f}") -> str:
    """Mean, standard deviation and range."""
    if len(values) == 1:
        return form.format(values[0])
    low, high = form.format(min(values)), form.format(max(values))
    return f"{form.format(mean(values))} ± {stdev(values):.2f} ({low} to {high})"


PAGE = """# The roadmap on handwritten digits

The part of the paper's table 2 that foveal's blocks make up, from PVTv2's blocks (step 3) to TransNeXt's (step 8),
scaled down to what one CPU core trains in minutes. [{json}]({json}) holds every run. The command:

```bash
{command}
```

| step | change | parameters | multiply-adds | accuracy, % | gain over the step before, points |
|---|---|---|---|---|---|
{rows}

Mean ± standard deviation over {count} seeds, and their range. A seed draws the training images, the initial weights,
the order and the augmentation. All steps share it, so a gain is a difference within a seed: its spread is free of
what makes one draw of images easier than another.

{verdict}

## What was run

- Data: scikit-learn's {images} handwritten digits, 8 x 8 pixels, enlarged bilinearly to {img_size} x {img_size};
  {train_images} of them to train on, stratified, the {held_out} others held out.
- Model: three stages of two blocks, {dims} channels in heads of 24, on maps of 1/2, 1/4 and 1/8 of the
  image's side; keys reduced or pooled by 4, 2 and 1 (the third stage's attention is global). MLPs have a ratio of 4,
  gated ones of 8/3. All is declared in [examples/roadmap.py](../examples/roadmap.py) with `Stage`s alone.
- Training: {epochs} epochs in batches of {batch_size}, AdamW at {lr} with 10% warm-up and a cosine to a hundredth,
  weight decay 0.05, label smoothing 0.1, drop path 0.1, gradients clipped at 1; images turned by up to 10 degrees,
  shifted and scaled by up to a tenth. It is the same for every step and was not tuned on the held-out images, which
  are looked at once, after the last epoch. The default of 100 training images followed one try with 360 and one seed,
  in which steps 3 and 8 both reached 97.6%.
- Made with {versions}.
  The {runs} runs took {minutes:.0f} minutes of processor time.
"""


CAUTION = "this shows that every step trains and what it costs, not that table 2 holds."


def page(report: dict[str, Any], seeds: list[int], command: str, json_name: str) -> str:
    """The runs of some seeds as a page of markdown."""
    settings = report["settings"]
    accuracy = {(run["step"], run["seed"]): 100 * run["accuracy"] for run in report["runs"]}
    by_step = [[accuracy[step.number, seed] for seed in seeds] for step in ROADMAP]
    gains = [[b - a for a, b in zip(*pair, strict=True)] for pair in pairwise(by_step)]
    rows = []
    for step, values, gain in zip(ROADMAP, by_step, [None, *gains], strict=True):
        parameters, multiply_adds = cost(step, settings["img_size"])
        numbers = f"{parameters / 1e6:.3f}M | {multiply_adds / 1e6:.1f}M | {spread(values)}"
        rows.append(
            f"| {step.number} | {step.change} | {numbers} | {'' if gain is None else spread(gain, '{:+.2f}')} |"
        )
    overall = [last - first for first, last in zip(by_step[0], by_step[-1], strict=True)]
    total = len(load_digits().target)
    return PAGE.format(
        command=command,
        json=json_name,
        rows="\n".join(rows),
        count=len(seeds),
        verdict=verdict(gains, overall),
        images=total,
        held_out=total - settings["train_images"],
        dims=", ".join(map(str, DIMS)),
        versions=", ".join(f"{name} {version}" for name, version in report["made_with"].items()),
        runs=len(ROADMAP) * len(seeds),
        minutes=sum(run["seconds"] for run in report["runs"] if run["seed"] in seeds) / 60,
        **settings,
    )


def verdict(gains: list[list[float]], overall: list[float]) -> str:
    """What the seeds allow one to say, and no more."""
    numbers = [str(step.number) for step in ROADMAP[1:]]
    parts: dict[str, list[str]] = {"up": [], "down": [], "unclear": []}
    for number, gain in zip(numbers, gains, strict=True):
        kind = "up" if min(gain) > 0 else "down" if max(gain) < 0 else "unclear"
        parts[kind].append(number)
    said = {
        "up": "Better with every seed than the step before",
        "down": "Worse with every seed than the step before",
        "unclear": "Within the spread, with gains of either sign or none",
    }
    lines = [f"- {said[kind]}: step {', '.join(found)}." for kind, found in parts.items() if found]
    lines.append(f"- From step {ROADMAP[0].number} to step {ROADMAP[-1].number}: {spread(overall, '{:+.2f}')} points.")
    chance = f"The signs of {len(overall)} seeds agree by chance once in {2 ** (len(overall) - 1)} times"
    return "\n".join([*lines, "", f"{chance}, and a small data set says little about ImageNet:", CAUTION])


def open_report(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The report to go on with, or an empty one."""
    fresh = {"settings": settings, "made_with": made_with(), "runs": []}
    try:
        report = json.loads(path.read_text())
    except FileNotFoundError:
        return fresh
    except ValueError as error:
        refuse("--output", f"{path} is no report of this command ({error})")
    for kind in ("settings", "made_with"):
        for name, value in fresh[kind].items():
            if (had := report.get(kind, {}).get(name)) != value:
                refuse("--output", f"{path} was begun with {name} {had}, now it is {value}; choose another output")
    return report


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    add("--train-images", type=positive, default=100, help="of the 1797; the others are held out; default: %(default)s")
    add("--img-size", type=positive, default=32, help="side of the images in pixels; default: %(default)s")
    add("--epochs", type=positive, default=100, help="default: %(default)s")
    add("--batch-size", type=positive, default=50, help="default: %(default)s")
    add("--lr", type=float, default=2e-3, help="AdamW's learning rate after warm-up; default: %(default)s")
    add("--threads", type=positive, default=1, help="CPU threads; default: %(default)s")
    add("--output", type=Path, default=Path("runs/roadmap"), help="path without .json, .md; default: %(default)s")
    args = parser.parse_args(argv)
    if not 10 <= args.train_images <= 1787:
        refuse("--train-images", f"must be 10 to 1787, so that both parts hold every digit, got {args.train_images}")
    if len({*args.seeds}) < len(args.seeds):
        refuse("--seeds", f"must differ, got {' '.join(map(str, args.seeds))}")
    torch.set_num_threads(args.threads)

    path = args.output.with_name(f"{args.output.name}.json")
    settings = {name: getattr(args, name) for name in ("train_images", "img_size", "epochs", "batch_size", "lr")}
    report = open_report(path, settings)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        complete(report, args.seeds, lambda: write_text(path, json.dumps(report, indent=1) + "\n"))
    except KeyboardInterrupt:
        print(f"Stopped. {len(report['runs'])} finished runs are in {path}; the same command goes on.")
        return 130
    command = shlex.join(["python", "examples/roadmap.py", *(sys.argv[1:] if argv is None else argv)])
    text = page(report, args.seeds, command, path.name)
    write_text(path.with_suffix(".md"), text)
    print(text.partition("\n## ")[0])
    print(f"Written to {path} and {path.with_suffix('.md')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
