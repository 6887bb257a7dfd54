"""Whether calling a child means its class's own arithmetic, so that its weights may be read instead."""

from collections.abc import Callable
from typing import Any

from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from foveal.ops.tracing import shape_of

# The layers that may be read, as they were imported: a class whose forward is replaced later is another one.
_FORWARDS: dict[type, Callable] = {
    kind: kind.forward
    for kind in (
        nn.Linear,
        nn.LayerNorm,
        nn.GELU,
        nn.ReLU,
        nn.SiLU,
        nn.Identity,
        nn.Dropout,
        DropPath,
        nn.Conv2d,
    )
}


def is_untouched(module: nn.Module) -> bool:
    """Whether calling a module runs its class's forward and nothing besides: no hook, no forward of its own.

    Tools leave hooks (pruning, the older weight norm, profilers), give an instance a forward (accelerate, adapters),
    or ``.compile()`` it. Its children are not asked.
    """
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module._compiled_call_impl
        or getattr(module.forward, "__func__", None) is not type(module).forward
        or torch_module._has_any_global_hook()
    )


def is_plain(module: nn.Module, x: Tensor) -> bool:
    """Whether calling a layer on ``x`` does nothing but its class's arithmetic on ordinary parameters beside ``x``.

    It does not where somebody has replaced, wrapped, subclassed, hooked, reparametrised, quantised or compiled it, set
    it up otherwise than foveal's ops assume (a Conv2d: depthwise, of unchanged size), or keeps its weights elsewhere
    between calls. Then it is to be called.
    """
    kind: Any = type(module)
    if not isinstance(x, Tensor) or _FORWARDS.get(kind) is not kind.forward or not is_untouched(module):
        return False
    device = x.device
    for parameter in module._parameters.values():
        if parameter is not None and (type(parameter) is not nn.Parameter or parameter.device != device):
            return False
    return _suits_ops(module)


def are_plain(x: Tensor, *modules: nn.Module) -> bool:
    return all(is_plain(module, x) for module in modules)


def is_idle(module: nn.Module, x: Tensor) -> bool:
    """Whether a layer returns its input as it is: Identity, or a dropout that drops nothing."""
    if not is_plain(module, x):
        return False
    if isinstance(module, nn.Dropout):
        return not module.training or module.p == 0
    if isinstance(module, DropPath):
        return not module.training or module.drop_prob == 0
    return type(module) is nn.Identity


def activation_name(act: nn.Module, x: Tensor) -> str | None:
    """The name under which foveal's ops fuse an activation; None where it is to be called."""
    if not is_plain(act, x):
        return None
    if type(act) is nn.GELU:
        return "gelu" if act.approximate == "none" else "gelu_tanh"
    return {nn.ReLU: "relu", nn.SiLU: "silu", nn.Identity: "identity"}.get(type(act))


def weights_of(*layers: Any) -> list[Any]:
    """Weight and bias (a tensor or None) of every layer, in a row, as ops take them."""
    return [parameter for layer in layers for parameter in (layer.weight, layer.bias)]


def _suits_ops(module: Any) -> bool:
    """Whether parameters are where the class keeps them, and settings are those that foveal's ops stand for."""
    kind, parameters = type(module), module._parameters
    if kind is nn.Linear:
        return parameters.get("weight") is not None and "bias" in parameters
    if kind is nn.LayerNorm:
        return len(module.normalized_shape) == 1 and "weight" in parameters and "bias" in parameters
    if kind is nn.Conv2d:  # a depthwise one that keeps the size
        weight = parameters.get("weight")
        if weight is None or "bias" not in parameters or module.padding_mode != "zeros":
            return False
        channels, _, size, _ = shape_of(weight)
        same_size = module.padding == (size // 2, size // 2) and module.stride == module.dilation == (1, 1)
        return same_size and module.groups == channels
    return True
