"""The sliding window's two products, for mixers of the user's own."""

import torch
from torch import Tensor

from foveal.ops import reference
from foveal.ops._checks import check_dim, check_same_device, check_same_dtype, check_shape, check_window_size
from foveal.ops._declaration import (
    declare,
    declare_gradient,
    fake_gradients,
    gradients,
    gradients_to_differentiate,
    only_wanted,
    wanted_mask,
)
from foveal.ops.backend import runs_compiled, unserved_dtype
from foveal.ops.tracing import shape_of

_MAP = "(B, H, W, heads, d)"


def window_scores(q: Tensor, k: Tensor, window_size: int) -> Tensor:
    """The products of every query with the keys of the window around it.

    Equivalent to ``einsum("bhwnd,bhwndc->bhwnc", q, windows(k))`` with the window's cells in row-major order, and -inf
    at the cells outside the map, so that a softmax cuts the window at the border.

    Args:
        q: ``(B, H, W, heads, d)``.
        k: ``(B, H, W, heads, d)``, of q's dtype.
        window_size: side k of the window, odd.

    Returns:
        ``(B, H, W, heads, k * k)`` in q's dtype.
    """
    check_window_size(window_size)
    check_dim("q", q, _MAP)
    check_shape("k", k, shape_of(q), _MAP)
    check_same_dtype(q=q, k=k)
    check_same_device(q, k=k)
    if runs_compiled("window_scores", k, unserved_dtype(k)):
        return torch.ops.foveal.window_scores(q, k, window_size)
    return reference.window_scores(q, k, window_size)


def window_sum(weights: Tensor, v: Tensor, window_size: int) -> Tensor:
    """The weighted sum of the values of the window around every cell.

    Equivalent to ``einsum("bhwnc,bhwndc->bhwnd", weights, windows(v))``; cells outside the map add nothing.

    Args:
        weights: ``(B, H, W, heads, k * k)``, of v's dtype.
        v: ``(B, H, W, heads, d)``.
        window_size: side k of the window, odd.

    Returns:
        ``(B, H, W, heads, d)`` in v's dtype.
    """
    check_window_size(window_size)
    check_dim("v", v, _MAP)
    check_shape("weights", weights, (*shape_of(v)[:-1], window_size**2), "(B, H, W, heads, k * k)")
    check_same_dtype(v=v, weights=weights)
    check_same_device(v, weights=weights)
    if runs_compiled("window_sum", v, unserved_dtype(v)):
        return torch.ops.foveal.window_sum(weights, v, window_size)
    return reference.window_sum(weights, v, window_size)


def _flops(left, right, window_size, *, out_shape=None) -> int:
    batch, height, width, heads, dim = right
    return 2 * batch * height * width * heads * dim * window_size**2


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.window_size = inputs
    ctx.save_for_backward(*tensors)


def _declare(name: str, tensors: str, definition, fake) -> None:
    """One of the two products, with its gradient: both take two tensors and the window's size."""

    def backward(grad, left, right, window_size, wanted):
        return gradients(lambda *inputs: definition(*inputs, window_size), (left, right), wanted, grad)

    def autograd(ctx, grad):
        wanted = wanted_mask(ctx.needs_input_grad[:2])
        if torch.is_grad_enabled():
            grads = gradients_to_differentiate(
                lambda *inputs: definition(*inputs, ctx.window_size), ctx.saved_tensors, wanted, grad
            )
            return *grads, None
        backward_op = getattr(torch.ops.foveal, f"{name}_backward")
        return *only_wanted(backward_op(grad, *ctx.saved_tensors, ctx.window_size, wanted), wanted), None

    declare(
        name,
        f"({tensors}, int window_size) -> Tensor",
        default=lambda *args: definition(*args).contiguous(),
        fake=fake,
        flops=_flops,
    )
    declare(
        f"{name}_backward",
        f"(Tensor grad, {tensors}, int window_size, int wanted) -> (Tensor, Tensor)",
        default=backward,
        fake=lambda grad, left, right, window_size, wanted: fake_gradients((left, right), wanted, grad),
        flops=lambda grad, left, right, window_size, wanted, out_shape=None: 2 * _flops(left, right, window_size),
    )
    declare_gradient(name, _setup_context, autograd)


_declare(
    "window_scores",
    "Tensor q, Tensor k",
    reference.window_scores,
    lambda q, k, window_size: q.new_empty((*q.shape[:-1], window_size**2)),
)
_declare(
    "window_sum",
    "Tensor weights, Tensor v",
    reference.window_sum,
    lambda weights, v, window_size: v.new_empty(v.shape),
)
