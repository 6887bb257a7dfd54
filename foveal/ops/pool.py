"""Activation and adaptive average pooling in one pass."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from foveal.ops import reference
from foveal.ops._checks import check_choice, check_dim, check_floating, check_grid, check_parameter, check_same_device
from foveal.ops._declaration import declare, declare_gradient, fake_gradients, gradients, gradients_to_differentiate
from foveal.ops.backend import infers_compiled, runs_compiled, unserved_dtype
from foveal.ops.tracing import shape_of

_MAX_SIDE_ON_GPUS = 65535  # whose product with another still fits 32 bits


def activate_and_pool(x: Tensor, grid: Sequence[int], act: str = "gelu", *, input_bias: Tensor | None = None) -> Tensor:
    """Activate a map and average it over a coarser grid (the inner part of equation 5).

    Equivalent to ``F.adaptive_avg_pool2d(act(x).permute(0, 3, 1, 2), grid).permute(0, 2, 3, 1)``: bin a of Hp covers
    the rows floor(a H / Hp) to ceil((a + 1) H / Hp) - 1, so bins overlap where the sizes do not divide.

    Args:
        x: ``(B, H, W, C)``.
        grid: the pooled grid (Hp, Wp), rows and columns.
        act: "gelu" (exact), "gelu_tanh", "relu", "silu" or "identity".
        input_bias: ``(C,)`` or None, added to x first. The bias of the Linear that makes x, given here and not there,
            saves a pass over x in inference on the CPU.

    Returns:
        ``(B, Hp, Wp, C)`` in the dtype of x; computed in float32 for half types. The kernels take gelu of infinity for
        infinity, where PyTorch's is NaN on the CPU.
    """
    check_dim("x", x, "(B, H, W, C)")
    check_floating("x", x)
    check_grid("grid", grid)
    if 0 in shape_of(x)[1:3]:
        raise ValueError(f"x must have a cell to average, got shape {tuple(x.shape)}")
    check_choice("act", act, tuple(reference.ACTIVATIONS))
    if input_bias is not None:
        check_parameter("input_bias", input_bias, shape_of(x)[-1:], "(C,)")
        check_same_device(x, input_bias=input_bias)
        if infers_compiled("activate_and_pool", x, input_bias):
            return torch.ops.foveal.activate_and_pool_with_input_bias(x, input_bias, tuple(grid), act)
        x = reference.biased(x, input_bias)
    if runs_compiled("activate_and_pool", x, _unsupported(x, grid)):
        return torch.ops.foveal.activate_and_pool(x, tuple(grid), act)
    return reference.activate_and_pool(x, grid, act)


def _unsupported(x: Tensor, grid: Sequence[int]) -> list[str]:
    reasons = unserved_dtype(x)
    if x.device.type == "cuda" and max(*shape_of(x)[1:3], *grid) > _MAX_SIDE_ON_GPUS:
        reasons.append(f"a side of more than {_MAX_SIDE_ON_GPUS} cells is not served on cuda")
    return reasons


def _fake(x: Tensor, grid: Sequence[int], act: str) -> Tensor:
    return x.new_empty((x.shape[0], *grid, x.shape[-1]))


def _setup_context(ctx, inputs, output) -> None:
    x, ctx.grid, ctx.act = inputs
    ctx.save_for_backward(x)


def _autograd(ctx, grad):
    if torch.is_grad_enabled():
        definition = partial(reference.activate_and_pool, grid=ctx.grid, act=ctx.act)
        return *gradients_to_differentiate(definition, ctx.saved_tensors, 1, grad), None, None
    return torch.ops.foveal.activate_and_pool_backward(grad, *ctx.saved_tensors, ctx.act), None, None


def _backward(grad: Tensor, x: Tensor, act: str) -> Tensor:
    grid = grad.shape[1:3]
    return gradients(lambda value: reference.activate_and_pool(value, grid, act), (x,), 1, grad)[0]


declare(
    "activate_and_pool",
    "(Tensor x, SymInt[] grid, str act) -> Tensor",
    default=lambda *args: reference.activate_and_pool(*args).contiguous(),
    fake=_fake,
)
declare(
    "activate_and_pool_with_input_bias",
    "(Tensor x, Tensor input_bias, SymInt[] grid, str act) -> Tensor",
    default=lambda x, input_bias, *args: reference.activate_and_pool(
        reference.biased(x, input_bias), *args
    ).contiguous(),
    fake=lambda x, input_bias, *args: _fake(x, *args),
)
declare(
    "activate_and_pool_backward",
    "(Tensor grad, Tensor x, str act) -> Tensor",
    default=_backward,
    fake=lambda grad, x, act: fake_gradients((x,), 1, grad)[0],
)
declare_gradient("activate_and_pool", _setup_context, _autograd)
