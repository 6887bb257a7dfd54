"""Reading off a module what its replacement needs to know: widths, rates, heads, device and dtype."""

import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn

from foveal.blocks.layouts.adapter import Adapter
from foveal.models._dry_run import output_shape


def check_no_hooks(module: nn.Module) -> None:
    if module._forward_hooks or module._forward_pre_hooks:
        raise ValueError("the module has forward hooks, which would be lost")


def widths_of(module: nn.Module) -> tuple[int, int]:
    """Channels in and out of a module that keeps the size of its map, read off a dry run.

    The order in which layers are registered tells nothing, so the module runs on maps, channels first and last, and on
    tokens, of every width that one of its layers takes, until one fits. What no tensor alone can run is taken to keep
    its width, where its first and its last layer agree on one.

    Raises:
        ValueError: the widths are unknown, or the module changes the size of the map.
    """
    inner = module.block if isinstance(module, Adapter) else module
    layers = _layers(inner)
    if not layers:
        raise ValueError(f"{type(inner).__name__} has neither a Linear nor a convolution that would tell its widths")
    try:
        inspect.signature(inner.forward).bind(None)
    except TypeError as error:
        dim, out_dim = _inputs(layers[0]), _outputs(layers[-1])
        if dim != out_dim:
            reason = f"it does not run on one tensor ({error}), its first layer takes {dim} channels and its last gives"
            raise ValueError(_unknown(inner, f"{reason} {out_dim}")) from error
        return dim, dim
    widths = list(dict.fromkeys(map(_inputs, layers)))
    failures = []
    for shape, channels in _probes(widths):
        try:
            out = output_shape(inner, shape, layers[0].weight.device, layers[0].weight.dtype)
        except ValueError as error:
            failures.append(str(error))
            continue
        if (*out[:channels], shape[channels], *out[channels + 1 :]) != shape:
            raise ValueError(f"the module changes the size of the map, from {shape} to {out}, and blocks keep it")
        return shape[channels], out[channels]
    tried = f"it runs on neither maps nor tokens of {' or '.join(map(str, widths))} channels"
    raise ValueError(_unknown(inner, f"{tried} ({failures[0]})"))


def _probes(widths: list[int]) -> Iterator[tuple[tuple[int, ...], int]]:
    """Shapes of an input, and which of their sides is that of the channels; the others are like none of the widths."""
    height, width = [side for side in range(56, 56 * (len(widths) + 3), 56) if side not in widths][:2]
    for dim in widths:
        yield (1, dim, height, width), 1
        yield (1, height, width, dim), 3
        yield (1, height * height, dim), 2  # a square number, which some networks take the root of


def _unknown(module: nn.Module, reason: str) -> str:
    return f"the widths of {type(module).__name__} are unknown: {reason}; set an adapter with its block there yourself"


def arguments_of(module: Any, owner: nn.Module, dim: int, out_dim: int) -> dict[str, Any]:
    """What a block may want to know of the module that it replaces, under the names of the blocks' arguments."""
    parameter = next(module.parameters(), None)
    if parameter is None:
        parameter = next(owner.parameters())
    known: dict[str, Any] = {"out_dim": out_dim, "device": parameter.device, "dtype": parameter.dtype}
    inner = module.block if isinstance(module, Adapter) else module
    known["drop"] = _rate(inner, "drop") or _rate(inner, "drop1")
    known["attn_drop"] = _rate(inner, "attn_drop")
    known["proj_drop"] = _rate(inner, "proj_drop")
    if isinstance(getattr(inner, "num_heads", None), int):
        known["num_heads"] = inner.num_heads
    hidden_dim = _gated_width(module, dim, out_dim)
    if hidden_dim is not None:
        known["hidden_dim"] = hidden_dim
    return known


def _gated_width(module: nn.Module, dim: int, out_dim: int) -> int | None:
    """The hidden width with which a gated block has the parameters of an MLP; None for what is no MLP."""
    layers = _layers(module)
    pointwise = [part for part in layers if isinstance(part, nn.Linear) or part.kernel_size == (1, 1)]
    if len(pointwise) < 2 or any(part.groups == 1 for part in layers if part not in pointwise):
        return None
    for last in pointwise:
        others = [part for part in pointwise if part is not last]
        if _outputs(last) == out_dim and all(_inputs(part) == dim for part in others):
            width, given = _inputs(last), sum(map(_outputs, others))
            if given in (width, 2 * width):
                return int(width * 2 / 3) if given == width else width  # a plain one; one that is gated already
    return None


def _rate(module: nn.Module, name: str) -> float:
    dropout = getattr(module, name, 0.0)
    return dropout.p if isinstance(dropout, nn.Dropout) else float(dropout) if isinstance(dropout, float) else 0.0


def _layers(module: nn.Module) -> list[nn.Linear | nn.Conv2d]:
    return [part for part in module.modules() if isinstance(part, nn.Linear | nn.Conv2d)]


def _inputs(layer: nn.Linear | nn.Conv2d) -> int:
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels


def _outputs(layer: nn.Linear | nn.Conv2d) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
