"""Model level: images per second and peak memory of whole models, beside the floor and the peers."""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import timm
import torch

from benchmarks import measure
from benchmarks.contenders import available, build, graphed, step

_ONE_SIZE = ("timm:swin", "timm:maxvit")


@dataclass(frozen=True)
class Case:
    """One setting at which all contenders run."""

    variant: str = "transnext_tiny"
    batch: int = 8
    size: tuple[int, int] = (224, 224)
    dtype: str = "float32"
    training: bool = False
    device: str = "cpu"

    @property
    def title(self) -> str:
        mode = "forward + backward" if self.training else "inference"
        place = "" if self.device == "cpu" else f", {self.device}"
        return f"{self.variant}, {mode}, {self.dtype}, batch {self.batch}, {self.size[0]} x {self.size[1]}{place}"

    def images(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(self.batch, 3, *self.size, generator=generator)
        return images.to(self.device, getattr(torch, self.dtype))


def cases(variant: str, device: str, quick: bool) -> list[Case]:
    if quick:
        return [Case(variant, 2, (64, 64), training=training, device=device) for training in (False, True)]
    return _cpu_cases(variant) if device == "cpu" else _gpu_cases(variant, device)


def _cpu_cases(variant: str) -> list[Case]:
    return [
        Case(variant),
        Case(variant, training=True),
        Case(variant, batch=1),
        Case(variant, batch=1, training=True),
        Case(variant, dtype="bfloat16"),
        Case(variant, dtype="bfloat16", training=True),
        Case(variant, batch=1, dtype="bfloat16"),
        *(
            Case(other, batch=1, dtype=dtype)
            for other in timm.list_models("transnext_*", module="transnext")
            for dtype in ("float32", "bfloat16")
            if other != variant
        ),
        Case(variant, batch=1, size=(800, 1333)),
    ]


def _gpu_cases(variant: str, device: str) -> list[Case]:
    settings = [
        (256, (224, 224), "bfloat16"),
        (256, (224, 224), "float32"),
        (64, (384, 384), "bfloat16"),
        (4, (800, 1333), "bfloat16"),
        (1, (224, 224), "bfloat16"),
    ]
    return [Case(variant, *setting, training, device) for setting in settings for training in (False, True)]


def run(case: Case, *, rounds: int, peers: bool, memory: bool = True) -> list[dict]:
    """Measure all contenders of a case: a row each, the losing ones too."""
    names = available(case.variant, peers=peers, device=case.device)
    if case.size != (224, 224):
        names = [name for name in names if not name.startswith(_ONE_SIZE)]
    x, steps, failures = case.images(), {}, {}
    for name in names:
        try:
            steps[name] = _step(name, x, case.training)
            steps[name]()
        except Exception as error:
            failures[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            steps.pop(name, None)
    timings = measure.paired(steps, rounds=rounds, device=case.device, title=case.title)
    floor = timings[f"linear layers:{case.variant}"]
    rows = []
    for name in names:
        row: dict = {"level": "model", "case": asdict(case), "title": case.title, "name": name}
        if name in failures:
            rows.append(row | {"failed": failures[name]})
            continue
        timing = timings[name]
        row |= {
            "images_per_second": case.batch / timing.median,
            "milliseconds": 1e3 * timing.median,
            "of_linear_floor": timing.ratio_to(floor),
            "foveal_is_times": timings[f"foveal:{case.variant}"].ratio_to(timing),
            "seconds": timing.seconds,
        }
        if memory and not name.startswith(("linear", "graphed")):
            row["peak_bytes"] = _peak_memory(case, name)
        rows.append(row)
    return rows


def _step(name: str, x: torch.Tensor, training: bool) -> Callable[[], object]:
    one_step = step(build(name, x), x, training)
    return graphed(one_step) if name.startswith("graphed ") else one_step


def _peak_memory(case: Case, name: str) -> int:
    if case.device != "cpu":
        return _peak_here(case, name)
    return measure.in_fresh_process("benchmarks.models", json.dumps(asdict(case)), name)["peak_bytes"]


def _peak_here(case: Case, name: str) -> int:
    x = case.images()
    one_step = step(build(name, x), x, case.training)
    if case.device != "cpu":
        one_step()
    return measure.peak_memory(one_step, case.device)


def main(arguments: Sequence[str] | None = None) -> None:
    """The peak memory of one contender, in this fresh process."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("case", help="a Case as JSON")
    parser.add_argument("name", help="a contender")
    given = parser.parse_args(arguments)
    settings = json.loads(given.case)
    case = Case(**settings | {"size": tuple(settings["size"])})
    print(json.dumps({"peak_bytes": _peak_here(case, given.name)}))


if __name__ == "__main__":
    main()
