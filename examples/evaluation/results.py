"""What evaluate.py has measured so far: kept in a file, printed as tables, drawn over image sizes."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

from matplotlib.figure import Figure

from common.files import write_text
from common.refusals import brief, refuse
from evaluation.imagenet import mean_corruption_error

Row = dict[str, Any]
Panels = dict[str, dict[str, list[float]]]
COSTS: dict[str, tuple[str, Callable[[Any], float]]] = {
    "latency of an image (ms)": ("seconds", lambda rounds: 1e3 * median(rounds)),
    "processor time of an image (ms)": ("processor_seconds", lambda rounds: 1e3 * median(rounds)),
    "peak memory (MB)": ("peak_bytes", lambda peak: peak / 1e6),
}

SAVE_EVERY = 10  # seconds


class Results:
    """Rows of figures in a JSON file. A row is found by what it was measured for, and may be unfinished."""

    def __init__(self, folder: Path):
        self.path = folder / "results.json"
        try:
            self.rows: list[Row] = json.loads(self.path.read_text()) if self.path.exists() else []
        except ValueError as error:
            refuse("--output", f"{self.path} holds no results ({brief(error)})")
        self.saved = time.monotonic()

    def row(self, **key: Any) -> Row:
        found = next((row for row in self.rows if key.items() <= row.items()), None)
        if found is None:
            self.rows.append(found := dict(key))
        return found

    def save(self) -> None:
        """The old file stays whole until the new one is."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.path, json.dumps(self.rows, indent=1) + "\n")
        self.saved = time.monotonic()

    def save_now_and_then(self) -> None:
        if time.monotonic() - self.saved > SAVE_EVERY:
            self.save()


def panels(accuracy: Sequence[Row], costs: Sequence[Row], models: Sequence[str], sizes: Sequence[int]) -> Panels:
    """What was measured: for each quantity, and for each model, a value for each size."""
    found: Panels = {}
    for data in dict.fromkeys(row["data"].partition("/")[0] for row in accuracy):
        for model in models:
            for size in sizes:
                for quantity, value in accuracies(accuracy, data, model, size).items():
                    found.setdefault(f"{data}, {quantity} (%)", {}).setdefault(model, []).append(100 * value)
    for title, (field, figure) in COSTS.items():
        measured = {(row["model"], row["size"]): figure(row[field]) for row in costs if row.get(field) is not None}
        if measured:
            found[title] = {model: [measured[model, size] for size in sizes] for model in models}
    return found


def accuracies(rows: Sequence[Row], data: str, model: str, size: int) -> dict[str, float]:
    """Of one evaluation; for ImageNet-C the means over its folders, and the mCE."""
    mine = [row for row in rows if (row["data"].partition("/")[0], row["model"], row["size"]) == (data, model, size)]
    figures = {name: mean(row[f"{name}_hits"] / row["of"] for row in mine) for name in ("top-1", "top-5")}
    if data == "imagenet-c":
        figures["mCE"] = mean_corruption_error({row["data"]: 1 - row["top-1_hits"] / row["of"] for row in mine})
    return figures


def print_table(title: str, lines: Mapping[str, Sequence[float]], sizes: Sequence[int]) -> None:
    label = max(map(len, lines))
    digits = 2 if "%" in title else 0
    print(f"\n{title}\n{'':<{label}}" + "".join(f"{size:>9}" for size in sizes))
    for model, values in lines.items():
        print(f"{model:<{label}}" + "".join(f"{value:>9,.{digits}f}" for value in values))


def draw(found: Panels, sizes: Sequence[int], path: Path) -> None:
    """A panel for each quantity over the image size. Costs have logarithmic axes and the slope of the pixels."""
    figure = Figure(figsize=(5.4 * len(found), 4.6), layout="constrained")
    for axes, (title, lines) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
        for model, values in lines.items():
            axes.plot(sizes, values, ".-", label=model)
        if title in COSTS:
            start = min(values[0] for values in lines.values())
            slope = [start * (size / sizes[0]) ** 2 for size in sizes]
            axes.plot(sizes, slope, ":", color="grey", label="in proportion to the pixels")
            axes.loglog()
        axes.set(xlabel="image side (pixels)", title=title)
        axes.set_xticks(sizes, [str(size) for size in sizes], rotation=60)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)
