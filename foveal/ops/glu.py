"""ConvGLU as a whole, from its weights."""

import torch.nn.functional as F
from torch import Tensor

from foveal.ops._checks import check_dim, check_shape
from foveal.ops._slices import in_slices
from foveal.ops.backend import infers_on_cpu
from foveal.ops.gate import depthwise_gate
from foveal.ops.tracing import shape_of


def conv_glu(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    *,
    act: str = "gelu",
) -> Tensor:
    """A gated linear unit whose gate is convolved (equation 19).

    Equivalent to::

        gated = depthwise_gate(F.linear(x, weight1, bias1), conv_weight, conv_bias, act)
        return F.linear(gated, weight2, bias2)

    Where nobody differentiates on the CPU, a few images are taken at a time, and the bias of the first layer is left to
    the gate.

    Args:
        x: ``(B, H, W, C)``.
        weight1, bias1: ``(2 hidden, C)`` and ``(2 hidden,)`` or None; the gate's rows come first.
        conv_weight, conv_bias: ``(hidden, 1, k, k)``, k odd, and ``(hidden,)`` or None.
        weight2, bias2: ``(D, hidden)`` and ``(D,)`` or None.
        act: as of :func:`depthwise_gate`.

    Returns:
        ``(B, H, W, D)`` in the dtype that ``F.linear`` gives.
    """
    check_dim("x", x, "(B, H, W, C)")
    check_dim("weight1", weight1, "(2 hidden, C)")
    channels, hidden = shape_of(x)[-1], shape_of(conv_weight)[0]
    check_shape("weight1", weight1, (2 * hidden, channels), "(2 hidden, C)")
    check_shape("weight2", weight2, (shape_of(weight2)[0], hidden), "(D, hidden)")
    if not infers_on_cpu(x):
        gated = depthwise_gate(F.linear(x, weight1, bias1), conv_weight, conv_bias, act)
        return F.linear(gated, weight2, bias2)

    def few(x: Tensor) -> Tensor:
        gated = depthwise_gate(F.linear(x, weight1), conv_weight, conv_bias, act, input_bias=bias1)
        return F.linear(gated, weight2, bias2)

    return in_slices(few, x, 2 * hidden)
