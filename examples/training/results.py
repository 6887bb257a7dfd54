"""What a finished run leaves: weights, the curve, receptive fields."""

from argparse import Namespace
from itertools import islice
from pathlib import Path

from matplotlib.figure import Figure
from safetensors.torch import save_model
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from foveal.analysis import draw_receptive_fields, effective_receptive_field


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


def write_results(model: nn.Module, args: Namespace, test_set: Dataset) -> None:
    """Weights and the receptive fields of up to four stages, averaged over 64 held-out images."""
    save_model(model, str(args.output / "model.safetensors"))
    spread = Subset(test_set, range(0, len(test_set), max(1, len(test_set) // 64)))
    batches = [images.to(args.device) for images, _ in islice(DataLoader(spread, batch_size=8), 8)]
    count = len(model.feature_info)
    fields = {
        f"stage {stage + 1} of {count}": effective_receptive_field(model, batches, stage=stage)
        for stage in range(max(0, count - 4), count)
    }
    draw_receptive_fields(fields, args.output / "receptive_field.png")
