"""The log of a run: a JSON object a line, and the same numbers for TensorBoard where it was asked for."""

import json
from pathlib import Path

from common.files import write_text
from training.checkpoint import Run
from training.processes import rank


class Log:
    """log.jsonl of the output folder, written by the first process. What lies ahead of a resumed run is taken off."""

    def __init__(self, folder: Path, run: Run, tensorboard: bool = False):
        self.file = self.board = None
        if rank() > 0:
            return
        path = folder / "log.jsonl"
        kept = [line for line in read_lines(path) if before(run, line)]
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self.file = path.open("a", buffering=1)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=run.step + 1)

    def write(self, **line: float) -> None:
        if self.file:
            self.file.write(json.dumps(line) + "\n")
        if self.board:
            for name in line.keys() - {"step", "epoch"}:
                self.board.add_scalar(("epoch/" if "test_loss" in line else "step/") + name, line[name], line["step"])

    def close(self) -> None:
        for sink in (self.file, self.board):
            if sink:
                sink.close()


def read_lines(path: Path) -> list[dict[str, float]]:
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:  # the line that a kill cut off
            break
    return lines


def before(run: Run, line: dict[str, float]) -> bool:
    """Whether a line is part of what the run has reached."""
    return line["step"] <= run.step and ("test_loss" not in line or line["epoch"] <= len(run.history))
