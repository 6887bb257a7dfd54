"""The seam of two residual branches: their sum and its LayerNorm, in one pass."""

import torch
from torch import Tensor

from foveal.ops import reference
from foveal.ops._checks import check_floating, check_same_device, check_shape
from foveal.ops._library import declare
from foveal.ops.backend import infers_compiled


def add_layer_norm(
    x: Tensor, y: Tensor | None, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Add a branch to the stream, and normalise the sum over its channels.

    Equivalent to::

        total = x if y is None else x + y
        return total, F.layer_norm(total, total.shape[-1:], weight, bias, eps)

    which is what runs under autograd and autocast and on other devices than the CPU, where compilers fuse it.

    Args:
        x: ``(*, C)``.
        y: like x, or None: nothing is added.
        weight: ``(C,)`` or None.
        bias: ``(C,)`` or None.
        eps: added to the variance.

    Returns:
        The sum (x itself without y) and its norm, ``(*, C)``.
    """
    check_floating("x", x)
    if y is not None:
        check_shape("y", y, x.shape, "that of x")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            check_shape(name, parameter, x.shape[-1:], "(C,)")
    check_same_device(x, y=y, weight=weight, bias=bias)
    others = [t for t in (y, weight, bias) if t is not None]
    mixed = torch.is_autocast_enabled("cpu") or any(t.dtype != x.dtype for t in others)
    if mixed or not infers_compiled("add_layer_norm", x, *others):
        return reference.add_layer_norm(x, y, weight, bias, eps)
    total, norm = torch.ops.foveal.add_layer_norm(x, y, weight, bias, eps)
    return x if y is None else total, norm


def _fake(x: Tensor, y: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty((0,) if y is None else x.shape), x.new_empty(x.shape)


def _default(x: Tensor, y: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float):
    total, norm = reference.add_layer_norm(x, y, weight, bias, eps)
    return x.new_empty(0) if y is None else total.contiguous(), norm.contiguous()


declare(
    "add_layer_norm",
    "(Tensor x, Tensor? y, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor)",
    default=_default,
    fake=_fake,
)
