"""Gated linear units: a value gated by an activation, and the designs that the paper compares ConvGLU with."""

from collections.abc import Callable

from torch import Tensor, nn

from foveal.blocks._checks import check_map, check_positive
from foveal.blocks._convolution import convolve, depthwise_conv
from foveal.blocks._initialization import init_convolution, init_linear
from foveal.blocks._module import MapModule


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """Gate and value of ``x = [gate | value]``: slices, which autograd lets an activation overwrite, unlike chunks."""
    hidden = x.shape[-1] // 2
    return x[..., :hidden], x[..., hidden:]


class GLU(MapModule):
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
        check_map(x, self.dim)
        return self.drop(self.fc2(self.drop(self.gated(self.fc1(x)))))

    def gated(self, x: Tensor) -> Tensor:
        """The value, gated, of ``x = [gate | value]``: ``(B, H, W, 2 hidden)`` to ``(B, H, W, hidden)``."""
        return self.mix(*halves(x))

    def mix(self, gate: Tensor, value: Tensor) -> Tensor:
        return value * self.act(gate)

    def pointwise(self, x: Tensor) -> Tensor:
        """The same without a convolution, for tokens ``(..., C)`` that have no place in a map."""
        gate, value = halves(self.fc1(x))
        return self.drop(self.fc2(self.drop(value * self.act(gate))))


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
        self.dwconv = depthwise_conv(self.hidden_dim, kernel_size=kernel_size, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if hasattr(self, "dwconv"):  # the constructor of GLU, which has none, calls this too
            init_convolution(self.dwconv)


class ConvGLUType1(DepthwiseGLU):
    """``value * dwconv(act(gate))`` (equation 20)."""

    def mix(self, gate: Tensor, value: Tensor) -> Tensor:
        return value * convolve(self.dwconv, self.act(gate))


class ConvGLUType2(DepthwiseGLU):
    """``dwconv(value) * act(gate)`` (equation 21)."""

    def mix(self, gate: Tensor, value: Tensor) -> Tensor:
        return convolve(self.dwconv, value) * self.act(gate)


class ConvGLUType3(DepthwiseGLU):
    """``dwconv(value * act(gate))`` (equation 22)."""

    def mix(self, gate: Tensor, value: Tensor) -> Tensor:
        return convolve(self.dwconv, value * self.act(gate))
