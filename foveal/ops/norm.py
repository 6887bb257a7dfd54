"""The seam of two residual branches: their sum and its LayerNorm, in one pass."""

import torch
from torch import Tensor

from foveal.ops import reference
from foveal.ops._checks import check_floating, check_parameter, check_same_device
from foveal.ops._declaration import declare
from foveal.ops.backend import infers_compiled
from foveal.ops.tracing import shape_of


def add_layer_norm(
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    y_bias: Tensor | None = None,
    inplace: bool = False,
) -> tuple[Tensor, Tensor]:
    """Add a branch to the stream, and normalise the sum over its channels.

    Equivalent to::

        total = x if y is None else x + (y + y_bias)
        return total, F.layer_norm(total, total.shape[-1:], weight, bias, eps)

    which is what runs under autograd and autocast and on other devices than the CPU, where compilers fuse it.

    Args:
        x: ``(*, C)``.
        y: like x, or None: nothing is added.
        weight: ``(C,)`` or None.
        bias: ``(C,)`` or None.
        eps: added to the variance.
        y_bias: ``(C,)`` or None. The bias of the Linear that makes y, given here and not there, saves a pass over y.
        inplace: x may be overwritten, with the sum, to save memory and time. Then nobody else may need it, nor may the
            other arguments share its memory.

    Returns:
        The sum (x itself without y) and its norm, ``(*, C)``.
    """
    check_floating("x", x)
    if x.dim() == 0:
        raise ValueError("x must have shape (*, C), got a scalar")
    if y is not None:
        check_parameter("y", y, shape_of(x), "that of x")
    elif y_bias is not None:
        raise ValueError("y_bias must be None where y is None: there is nothing that it belongs to")
    for name, parameter in (("weight", weight), ("bias", bias), ("y_bias", y_bias)):
        check_parameter(name, parameter, shape_of(x)[-1:], "(C,)")
    check_same_device(x, y=y, weight=weight, bias=bias, y_bias=y_bias)
    others = [t for t in (y, y_bias, weight, bias) if t is not None]
    mixed = bool({t.dtype for t in others} - {x.dtype})
    if mixed or torch.is_autocast_enabled("cpu") or not infers_compiled("add_layer_norm", x, *others):
        return reference.add_layer_norm(x, y, y_bias, weight, bias, eps)
    if inplace and y is not None and x.is_contiguous():
        norm = torch.ops.foveal.add_layer_norm_(x, y, y_bias, weight, bias, eps)
        if not torch.compiler.is_compiling():
            torch.autograd.graph.increment_version(x)  # or a backward pass that needs x would not notice
        return x, norm
    total, norm = torch.ops.foveal.add_layer_norm(x, y, y_bias, weight, bias, eps)
    return x if y is None else total, norm


def _default(x: Tensor, y: Tensor | None, *args) -> tuple[Tensor, Tensor]:
    total, norm = reference.add_layer_norm(x, y, *args)
    return x.new_empty(0) if y is None else total.contiguous(), norm.contiguous()


def _default_inplace(x: Tensor, *args) -> Tensor:
    total, norm = reference.add_layer_norm(x, *args)
    x.copy_(total)
    return norm.contiguous()


_OTHERS = "Tensor? y_bias, Tensor? weight, Tensor? bias, float eps"

declare(
    "add_layer_norm",
    f"(Tensor x, Tensor? y, {_OTHERS}) -> (Tensor, Tensor)",
    default=_default,
    fake=lambda x, y, *args: (x.new_empty((0,) if y is None else x.shape), x.new_empty(x.shape)),
)
declare(
    "add_layer_norm_",
    f"(Tensor(a!) x, Tensor y, {_OTHERS}) -> Tensor",
    default=_default_inplace,
    fake=lambda x, *args: x.new_empty(x.shape),
)
