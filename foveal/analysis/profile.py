"""What each block of a model costs: parameters, multiply-adds, and the memory that it holds for the backward pass."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from foveal.analysis._evaluating import evaluating
from foveal.analysis.flops import MISSING_IN_TORCH, flop_counter
from foveal.analysis.parameters import count_parameters

REST = "(between blocks)"


class BlockCost(NamedTuple):
    """The cost of one module in a forward pass over a batch.

    Attributes:
        name: of the module; "(between blocks)" is what the model does outside of the listed ones.
        parameters: their number.
        flops: of the forward pass, as :func:`count_flops` counts them: a multiply-add is two, norms are none.
        saved_bytes: the memory of activations that a forward pass with gradients leaves for the backward pass.
    """

    name: str
    parameters: int
    flops: int
    saved_bytes: int


def profile_blocks(model: nn.Module, images: Tensor, blocks: Sequence[str] | None = None) -> list[BlockCost]:
    """What the blocks of a model cost, in one forward pass with gradients, in eval mode.

    ``saved_bytes`` is the size of the storages that autograd saved while the block ran: each storage once, in the block
    that saved it first, and without those of parameters, buffers and the images. The sum over all entries is what the
    forward pass leaves allocated (dropout, which saves masks in training, aside). It is not the peak, which adds what
    an operation needs while it runs.

    Args:
        model: any model.
        images: ``(B, in_chans, H, W)``, on the model's device; the costs are those of the batch.
        blocks: names of modules, none inside another. None takes a model apart down to the modules that hold no
            ``nn.Sequential`` or ``nn.ModuleList``: for timm's models the blocks, downsamplings, norms and the head.

    Returns:
        An entry for every block in the order of ``blocks``, and, where it costs something, one for the rest; so that
        the entries sum to the model.

    Raises:
        ValueError: where ``blocks`` names no module, or one inside another.
    """
    names = list(_parts(model, "")) if blocks is None else list(blocks)
    known = dict(model.named_modules())
    for name in names:
        if name not in known:
            raise ValueError(f"blocks must name modules of the model, got {name!r}")
        if outer := [other for other in names if name.startswith(f"{other}.")]:
            raise ValueError(f"blocks must not lie inside one another, {name!r} is inside {outer[0]!r}")

    saved: dict[str, int] = dict.fromkeys((*names, REST), 0)
    running = [REST]
    known_storages = {storage.data_ptr(): storage for storage in map(_storage, (images, *_weights(model)))}

    def save(x: Tensor) -> Tensor:
        storage = _storage(x)
        if storage.data_ptr() not in known_storages:
            known_storages[storage.data_ptr()] = storage  # kept, so that no other gets its address
            saved[running[-1]] += storage.nbytes()
        return x

    counter = flop_counter(MISSING_IN_TORCH, running)
    with (
        evaluating(model),
        torch.inference_mode(False),
        torch.enable_grad(),
        _announced(known, names, running),
        counter,
        saved_tensors_hooks(save, lambda x: x),
    ):
        model(images)
    flops = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    costs = [BlockCost(name, count_parameters(known[name]), flops.get(name, 0), saved[name]) for name in names]
    sums = [sum(column) for column in list(zip(*costs, strict=True))[1:]]
    totals = count_parameters(model), flops.get("Global", 0), sum(saved.values())
    rest = BlockCost(REST, *(total - part for total, part in zip(totals, sums, strict=True)))
    return [*costs, rest] if any(rest[1:]) else costs


def _parts(module: nn.Module, name: str) -> Iterator[str]:
    """The names of the modules that hold no container."""
    containers = nn.Sequential, nn.ModuleList
    if not isinstance(module, containers) and not any(isinstance(child, containers) for child in module.children()):
        yield name
        return
    for child_name, child in module.named_children():
        yield from _parts(child, f"{name}.{child_name}".lstrip("."))


def _storage(x: Tensor) -> torch.UntypedStorage:
    return x.untyped_storage()


def _weights(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


@contextmanager
def _announced(modules: dict[str, nn.Module], names: Sequence[str], running: list[str]) -> Iterator[None]:
    """While a named module runs, its name is the last of ``running``."""
    hooks = []
    for name in names:
        hooks.append(modules[name].register_forward_pre_hook(lambda *_, name=name: running.append(name)))
        hooks.append(modules[name].register_forward_hook(lambda *_: running.pop() and None))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def draw_profile(costs: Sequence[BlockCost], path: str | Path, *, title: str | None = None) -> None:
    """Write a PNG with bars of every block's parameters, multiply-adds and saved memory. Needs matplotlib."""
    if not costs:
        raise ValueError("costs must hold at least one block, got none")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 0.21 * len(costs) + 1.6), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    names = [cost.name for cost in costs]
    columns = {
        "parameters, millions": [cost.parameters / 1e6 for cost in costs],
        "multiply-adds, millions": [cost.flops / 2e6 for cost in costs],
        "saved for the backward pass, MB": [cost.saved_bytes / 1e6 for cost in costs],
    }
    for panel, (label, values), colour in zip(panels, columns.items(), ("C0", "C1", "C2"), strict=True):
        panel.barh(names, values, color=colour)
        panel.set(xlabel=label, title=f"{sum(values):,.1f} in all")
        panel.grid(axis="x", alpha=0.3)
    panels[0].invert_yaxis()
    panels[0].tick_params(axis="y", labelsize="small")
    figure.suptitle(title or "What each block costs")
    figure.savefig(path, dpi=100)
