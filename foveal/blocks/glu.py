"""Gated linear units: a value gated by an activation, and the designs that the paper compares ConvGLU with."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from foveal.blocks._checks import check_map, check_positive
from foveal.blocks._initialization import init_linear
from foveal.blocks.depthwise_conv import DepthwiseConv
from foveal.blocks.inference import in_slices, is_idle, is_plain_linear


class GLU(nn.Module):
    """``fc2(value * act(gate))`` where ``gate, value = fc1(x)``: ``(B, H, W, C)`` to ``(B, H, W, out_dim)``.

    Args:
        dim: channels C.
        hidden_dim: width of the gate and of the value; None means int(dim * 4 * 2 / 3).
        out_dim: output channels; None means dim.
        act_layer: activation of the gate.
        drop: dropout before and after the last Linear.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int | None = None,
        out_dim: int | None = None,
        *,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        drop: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        hidden_dim = int(dim * 4 * 2 / 3) if hidden_dim is None else hidden_dim
        out_dim = dim if out_dim is None else out_dim
        check_positive("hidden_dim", hidden_dim)
        check_positive("out_dim", out_dim)
        self.dim = dim
        self.hidden_dim = hidden_dim
        self.fc1 = nn.Linear(dim, 2 * hidden_dim, device=device, dtype=dtype)
        self.act = act_layer()
        self.drop = nn.Dropout(drop)
        self.fc2 = nn.Linear(hidden_dim, out_dim, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init_linear(self.fc1)
        init_linear(self.fc2)

    def forward(self, x: Tensor) -> Tensor:
        return self._in_slices(lambda part: self.drop(self.fc2(self.drop(self._hidden(part)))), x)

    def without_last_bias(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """``forward(x)`` in two parts, see :func:`foveal.blocks.inference.without_last_bias`."""
        if not is_plain_linear(self.fc2) or not is_idle(self.drop):
            return self(x), None
        return self._in_slices(lambda part: F.linear(self._hidden(part), self.fc2.weight), x), self.fc2.bias

    def _in_slices(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        check_map(x, self.dim)
        return in_slices(self, function, x, 2 * self.hidden_dim)

    def _hidden(self, x: Tensor) -> Tensor:
        """What fc2 projects, ``(B, H, W, hidden)``."""
        return self.mix(self.fc1(x))

    def pointwise(self, x: Tensor) -> Tensor:
        """The same without a convolution, for tokens ``(..., C)`` that have no place in a map."""
        return self.drop(self.fc2(self.drop(GLU.mix(self, self.fc1(x)))))

    def mix(self, x: Tensor) -> Tensor:
        """Join ``x = [gate | value]``, ``(B, H, W, 2 hidden)``, into ``(B, H, W, hidden)``."""
        gate, value = x.chunk(2, dim=-1)
        return value * self.act(gate)


class DepthwiseGLU(GLU):
    """A GLU with a depthwise convolution somewhere in it."""

    def __init__(
        self,
        dim: int,
        hidden_dim: int | None = None,
        out_dim: int | None = None,
        *,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        kernel_size: int = 3,
        drop: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__(dim, hidden_dim, out_dim, act_layer=act_layer, drop=drop, device=device, dtype=dtype)
        self.dwconv = DepthwiseConv(self.hidden_dim, kernel_size=kernel_size, device=device, dtype=dtype)


class ConvGLUType1(DepthwiseGLU):
    """``value * dwconv(act(gate))`` (equation 20)."""

    def mix(self, x: Tensor) -> Tensor:
        gate, value = x.chunk(2, dim=-1)
        return value * self.dwconv(self.act(gate))


class ConvGLUType2(DepthwiseGLU):
    """``dwconv(value) * act(gate)`` (equation 21)."""

    def mix(self, x: Tensor) -> Tensor:
        gate, value = x.chunk(2, dim=-1)
        return self.dwconv(value) * self.act(gate)


class ConvGLUType3(DepthwiseGLU):
    """``dwconv(value * act(gate))`` (equation 22)."""

    def mix(self, x: Tensor) -> Tensor:
        gate, value = x.chunk(2, dim=-1)
        return self.dwconv(value * self.act(gate))
