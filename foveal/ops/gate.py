"""The heart of ConvGLU: a depthwise convolution, an activation and a product, in one pass."""

from functools import partial

import torch
from torch import Tensor

from foveal.ops import reference
from foveal.ops._checks import (
    check_choice,
    check_dim,
    check_floating,
    check_parameter,
    check_same_device,
    check_shape,
)
from foveal.ops._declaration import (
    declare,
    declare_gradient,
    fake_gradients,
    gradients,
    gradients_to_differentiate,
    only_wanted,
    wanted_mask,
)
from foveal.ops.backend import infers_compiled, runs_compiled, unserved_dtype
from foveal.ops.tracing import shape_of


def depthwise_gate(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, act: str = "gelu", *, input_bias: Tensor | None = None
) -> Tensor:
    """Gate one half of the channels with the other, after a depthwise convolution (equation 19).

    Equivalent to::

        gate, value = x.chunk(2, dim=-1)
        gate = F.conv2d(gate.permute(0, 3, 1, 2), weight, bias, padding=k // 2, groups=C).permute(0, 2, 3, 1)
        return act(gate) * value

    Args:
        x: ``(B, H, W, 2C)``, the gate's channels first.
        weight: ``(C, 1, k, k)``, k odd; may differ from x in dtype, and is converted to that of the computation.
        bias: ``(C,)`` or None.
        act: "gelu" (exact), "gelu_tanh", "relu", "silu" or "identity".
        input_bias: ``(2C,)`` or None, added to x first. The bias of the Linear that makes x, given here and not there,
            saves a pass over x in inference on the CPU.

    Returns:
        ``(B, H, W, C)`` in the dtype of x; computed in float32 for half types. NaN and infinity stay in their channel.
        There, in the kernels, their product with a zero outside the map counts, and is NaN; ``F.conv2d`` may leave it
        out. An infinite weight or input_bias may give infinity for NaN or NaN for infinity, and gelu of infinity is
        infinity, where PyTorch's is NaN on the CPU.
    """
    check_dim("x", x, "(B, H, W, 2C)")
    check_floating("x", x)
    check_dim("weight", weight, "(C, 1, k, k)")
    check_floating("weight", weight)
    channels, _, size, _ = shape_of(weight)
    if size % 2 == 0:
        raise ValueError(f"weight must have an odd kernel size, got {size}")
    check_shape("weight", weight, (channels, 1, size, size), "(C, 1, k, k)")
    if (given := shape_of(x)[-1]) != 2 * channels:
        raise ValueError(f"x must have 2C = {2 * channels} channels for a weight of C = {channels}, got {given}")
    check_parameter("bias", bias, (channels,), "(C,)")
    check_choice("act", act, tuple(reference.ACTIVATIONS))
    check_same_device(x, weight=weight, bias=bias, input_bias=input_bias)
    if input_bias is not None:
        check_parameter("input_bias", input_bias, (2 * channels,), "(2C,)")
        # Large kernels would lose digits where little of them is on the map.
        if size <= 7 and infers_compiled("depthwise_gate", x, weight, bias, input_bias):
            return torch.ops.foveal.depthwise_gate_with_input_bias(x, input_bias, weight, bias, act)
        x = reference.biased(x, input_bias)
    if runs_compiled("depthwise_gate", x, unserved_dtype(x)):
        return torch.ops.foveal.depthwise_gate(x, weight, bias, act)
    return reference.depthwise_gate(x, weight, bias, act)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, act: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


def _flops(x, weight, bias, act, *, out_shape=None) -> int:
    batch, height, width, channels = x
    return batch * height * width * channels * weight[-1] ** 2


def _backward(grad, x, weight, bias, act, wanted) -> tuple[Tensor, ...]:
    return gradients(lambda *inputs: reference.depthwise_gate(*inputs, act), (x, weight, bias), wanted, grad)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, ctx.act = inputs
    ctx.save_for_backward(x, weight, bias)


def _autograd(ctx, grad):
    wanted = wanted_mask(ctx.needs_input_grad[:3])
    if torch.is_grad_enabled():
        definition = partial(reference.depthwise_gate, act=ctx.act)
        return *gradients_to_differentiate(definition, ctx.saved_tensors, wanted, grad), None
    grads = torch.ops.foveal.depthwise_gate_backward(grad, *ctx.saved_tensors, ctx.act, wanted)
    return *only_wanted(grads, wanted), None


declare(
    "depthwise_gate",
    "(Tensor x, Tensor weight, Tensor? bias, str act) -> Tensor",
    default=lambda *args: reference.depthwise_gate(*args).contiguous(),
    fake=_fake,
    flops=_flops,
)
declare(
    "depthwise_gate_with_input_bias",
    "(Tensor x, Tensor input_bias, Tensor weight, Tensor? bias, str act) -> Tensor",
    default=lambda x, input_bias, *args: reference.depthwise_gate(reference.biased(x, input_bias), *args).contiguous(),
    fake=lambda x, input_bias, *args: _fake(x, *args),
    flops=lambda x, input_bias, *args, out_shape=None: _flops(x, *args),
)
declare(
    "depthwise_gate_backward",
    "(Tensor grad, Tensor x, Tensor weight, Tensor? bias, str act, int wanted) -> (Tensor, Tensor, Tensor)",
    default=_backward,
    fake=lambda grad, x, weight, bias, act, wanted: fake_gradients((x, weight, bias), wanted, grad),
    flops=lambda grad, *args, out_shape=None: 2 * _flops(*args[:4]),
)
declare_gradient("depthwise_gate", _setup_context, _autograd)
