"""Export a model for deployment, check the result against the model, and time the two in turns.

    python examples/export.py --model transnext_tiny --formats pt2 onnx             # weights from the hub; 5 minutes
    python examples/export.py --checkpoint transnext_tiny_224_1k.pth --dynamic size --formats onnx
    python examples/export.py --random-weights --features --size 480 640 --formats aoti

pt2 is a program of torch.export, which PyTorch runs without foveal; aoti a package that AOTInductor compiles for this
machine's CPU or GPU (it needs a C++ compiler), also for C++; onnx a file for ONNX Runtime and others. With
--dynamic size, one file takes images of any size from some smallest one. On two cores transnext_tiny takes two minutes
longer then, and four as aoti.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from common.refusals import refuse, refuse_missing

if __name__ == "__main__":
    refuse_missing("--checkpoint")

import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from tqdm import tqdm

from common.arguments import add_device, add_import, check_device, positive
from common.models import import_modules, load_model

Runner = Callable[[Tensor], list[Tensor]]


class Logits(nn.Module):
    """A model's logits, as a list of one like the maps."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.names = ["logits"]

    def forward(self, images: Tensor) -> list[Tensor]:
        return [self.model(images)]


class Maps(nn.Module):
    """The feature maps of all stages, (B, C, H, W) each."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.names = [f"stride_{info['reduction']}" for info in model.feature_info]

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.model.forward_intermediates(images, intermediates_only=True)


def export(net: nn.Module, images: Tensor, dynamic: str) -> ExportedProgram:
    open_axes = {"none": (), "batch": (0,), "size": (0, 2, 3)}[dynamic]
    return torch.export.export(net, (images,), dynamic_shapes=(dict.fromkeys(open_axes, Dim.DYNAMIC),))


def smallest(program: ExportedProgram) -> str:
    """The smallest images that a program takes, as far as its axes are open."""
    (images,) = (node for node in program.graph.nodes if node.name in program.graph_signature.user_inputs)
    limits = program.range_constraints
    sides = (s if isinstance(s, int) else f"{limits[s.node.expr].lower} or more" for s in images.meta["val"].shape[2:])
    return " x ".join(map(str, sides))


def to_pt2(program: ExportedProgram, path: Path, names: list[str]) -> Runner:
    torch.export.save(program, path)
    return torch.export.load(path).module()


def to_aoti(program: ExportedProgram, path: Path, names: list[str]) -> Runner:
    torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    return torch._inductor.aoti_load_package(str(path))


def to_onnx(program: ExportedProgram, path: Path, names: list[str]) -> Runner:
    import onnxruntime

    torch.onnx.export(program, dynamo=True, input_names=["images"], output_names=names, verbose=False).save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: [torch.from_numpy(x) for x in session.run(None, {"images": images.cpu().numpy()})]


WRITERS = {"pt2": (to_pt2, ".pt2"), "aoti": (to_aoti, ".aoti.pt2"), "onnx": (to_onnx, ".onnx")}


def difference(actual: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference, as a part of the largest magnitude of its output."""
    parts = [
        (a.to(e.device) - e).abs().max() / e.abs().max().clamp(min=1e-30) for a, e in zip(actual, expected, strict=True)
    ]
    return max(part.item() for part in parts)


def paired_times(runners: list[Runner], images: Tensor, rounds: int) -> list[float]:
    """Median seconds of each runner, one call after the other in every round, so that a busy machine slows all."""
    times: list[list[float]] = [[] for _ in runners]
    for i in tqdm(range(rounds + 1), desc="timing", unit=" rounds", dynamic_ncols=True, leave=False):
        for runner, spent in zip(runners, times, strict=True):
            start = time.perf_counter()
            runner(images)
            if images.is_cuda:
                torch.cuda.synchronize()
            if i:  # the first round warms up
                spent.append(time.perf_counter() - start)
    return [median(spent) for spent in times]


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="transnext_tiny", metavar="NAME", help="a model of timm's; default: %(default)s")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--checkpoint", type=Path, metavar="FILE", help="an official .pth, or foveal's .safetensors")
    weights.add_argument("--random-weights", action="store_true", help="do without weights: shows that it works")
    add("--formats", nargs="+", choices=WRITERS, default=["pt2"], help="default: pt2")
    add("--features", action="store_true", help="export the feature maps of all stages, not the logits")
    add(
        "--dynamic",
        choices=("none", "batch", "size"),
        default="batch",
        help="what the export leaves open: nothing, the batch, or batch, height and width; default: %(default)s",
    )
    add("--size", nargs="+", type=positive, metavar="PIXELS", help="height and width; default: the model's")
    add("--batch-size", type=positive, default=2, help="of the images to export and time with; default: %(default)s")
    add("--rounds", type=positive, default=10, help="of the timing; default: %(default)s")
    add_import(parser)
    add_device(parser)
    add("--output", type=Path, default=Path("exports"), metavar="FOLDER", help="default: %(default)s")
    args = parser.parse_args(argv)
    if args.size and len(args.size) > 2:
        refuse("--size", f"expected one or two numbers, got {len(args.size)}")
    if args.dynamic != "none" and args.batch_size == 1:
        refuse("--batch-size", "must be at least 2 where the batch is left open: torch.export takes a 1 for fixed")
    check_device(args.device)
    return args


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    import_modules(args)
    model = load_model(args.model, args.checkpoint, args.random_weights).eval().to(args.device)
    height, width = (args.size * 2)[:2] if args.size else resolve_model_data_config(model)["input_size"][1:]
    images = torch.randn(args.batch_size, 3, height, width, device=args.device)
    net = (Maps if args.features else Logits)(model)
    checks = [images]
    if args.dynamic != "none":
        checks.append(torch.randn(args.batch_size + 1, 3, height, width, device=args.device))
    if args.dynamic == "size":
        checks.append(torch.randn(2, 3, height + 35, width + 10, device=args.device))
    args.output.mkdir(parents=True, exist_ok=True)
    runners = {"model": net}
    with tqdm(total=1 + len(args.formats), unit=" steps", dynamic_ncols=True, leave=False) as bar:
        bar.set_description("torch.export")
        start = time.perf_counter()
        program = export(net, images, args.dynamic)
        seconds = time.perf_counter() - start
        bar.write(f"{args.model} exported in {seconds:.0f} s, for images of {smallest(program)} pixels")
        bar.update()
        for name in args.formats:
            bar.set_description(f"writing and checking {name}")
            write, suffix = WRITERS[name]
            path = args.output / f"{args.model}{'_features' if args.features else ''}{suffix}"
            runners[name] = write(program, path, net.names)
            for x in checks:
                error = f"{difference(runners[name](x), net(x)):.1e} of the largest value"
                bar.write(f"{path}, {path.stat().st_size / 1e6:.1f} MB: {tuple(x.shape)} differs by {error}")
            bar.update()
    times = paired_times(list(runners.values()), images, args.rounds)
    for name, seconds in zip(runners, times, strict=True):
        speed = f"{times[0] / seconds:.2f} times the model's speed"
        print(f"{name}: {seconds * 1e3:.1f} ms for {tuple(images.shape)}, {speed}")


if __name__ == "__main__":
    main()
