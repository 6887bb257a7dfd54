"""All that a run has reached, on disk: one file, the same for one process, for copies (DDP) and for shards (FSDP2)."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from common.files import write_whole
from training.processes import rank


def no_sums() -> Tensor:
    """What a running mean needs: the sums of losses, hits and images."""
    return torch.zeros(3, dtype=torch.float64)


@dataclass
class Run:
    """What a checkpoint holds. Learning rate, order of the images and random draws follow from the step."""

    settings: dict[str, Any]
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler = field(default_factory=lambda: torch.amp.GradScaler(enabled=False))
    step: int = 0
    totals: Tensor = field(default_factory=no_sums)  # of this epoch so far
    history: list[dict[str, float]] = field(default_factory=list)  # one entry for each epoch

    def save(self, path: Path) -> None:
        """Write a checkpoint. The old one stays whole until the new one is. All processes must call."""
        state = {name: getattr(self, name) for name in ("settings", "step", "totals", "history")}
        state |= {"model": self.weights(), "optimizer": None, "scaler": self.scaler.state_dict()}
        if self.optimizer.state:  # asking one that never stepped for its state makes it take a step
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            state["optimizer"] = get_optimizer_state_dict(self.model, self.optimizer, options=options)
        if rank() == 0:
            write_whole(path, lambda file: torch.save(state, file))

    def load(self, state: dict[str, Any]) -> None:
        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(self.model, dict(state["model"]), options=options)
        if state["optimizer"]:
            set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"], options=options)
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.totals, self.history = state["step"], state["totals"], state["history"]

    def weights(self) -> dict[str, Tensor]:
        """The model's whole state dict, in the first process. All processes must call."""
        return get_model_state_dict(self.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
