"""Reading off a module what its replacement needs to know: widths, rates, heads, device and dtype."""

from typing import Any

from torch import nn

from foveal.blocks.layouts.adapter import Adapter


def check_no_hooks(module: nn.Module) -> None:
    if module._forward_hooks or module._forward_pre_hooks:
        raise ValueError("the module has forward hooks, which would be lost")


def check_keeps_size(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, nn.Conv2d) and max(part.stride) > 1:
            raise ValueError(f"the module changes the size of the map (stride {part.stride}), and blocks keep it")


def widths_of(module: nn.Module) -> tuple[int, int]:
    """Channels in and out, from the first and the last Linear or convolution."""
    layers = [part for part in module.modules() if isinstance(part, nn.Linear | nn.Conv2d)]
    if not layers:
        raise ValueError(f"{type(module).__name__} has neither a Linear nor a convolution that would tell its widths")
    return _inputs(layers[0]), _outputs(layers[-1])


def arguments_of(module: Any, owner: nn.Module) -> dict[str, Any]:
    """What a block may want to know of the module that it replaces, under the names of the blocks' arguments."""
    parameter = next(module.parameters(), None)
    if parameter is None:
        parameter = next(owner.parameters())
    known: dict[str, Any] = {"device": parameter.device, "dtype": parameter.dtype}
    inner = module.block if isinstance(module, Adapter) else module
    known["drop"] = _rate(inner, "drop") or _rate(inner, "drop1")
    known["attn_drop"] = _rate(inner, "attn_drop")
    known["proj_drop"] = _rate(inner, "proj_drop")
    if isinstance(getattr(inner, "num_heads", None), int):
        known["num_heads"] = inner.num_heads
    hidden_dim = _gated_width(module)
    if hidden_dim is not None:
        known["hidden_dim"] = hidden_dim
    return known


def _gated_width(module: nn.Module) -> int | None:
    """The hidden width with which a gated block has the parameters of an MLP; None for what is no MLP."""
    layers = [part for part in module.modules() if isinstance(part, nn.Linear | nn.Conv2d)]
    pointwise = [part for part in layers if isinstance(part, nn.Linear) or part.kernel_size == (1, 1)]
    if len(pointwise) < 2 or any(part.groups == 1 for part in layers if part not in pointwise):
        return None
    width, given = _inputs(pointwise[-1]), sum(map(_outputs, pointwise[:-1]))
    return {width: int(width * 2 / 3), 2 * width: width}.get(given)  # a plain one; one that is gated already


def _rate(module: nn.Module, name: str) -> float:
    dropout = getattr(module, name, 0.0)
    return dropout.p if isinstance(dropout, nn.Dropout) else float(dropout) if isinstance(dropout, float) else 0.0


def _inputs(layer: nn.Linear | nn.Conv2d) -> int:
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels


def _outputs(layer: nn.Linear | nn.Conv2d) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
