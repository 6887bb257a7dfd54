"""ConvFFN: PVTv2's feed-forward network with a depthwise convolution, the baseline of ConvGLU."""

from collections.abc import Callable

from torch import Tensor, nn

from foveal.blocks._checks import check_map, check_positive
from foveal.blocks._convolution import convolve, depthwise_conv
from foveal.blocks._initialization import init_convolution, init_linear
from foveal.blocks._module import MapModule


class ConvFFN(MapModule):
    """``fc2(act(dwconv(fc1(x))))``, ``(B, H, W, C)`` to ``(B, H, W, out_dim)`` (PVTv2, arXiv 2106.13797).

    Args:
        dim: channels C.
        hidden_dim: width of the hidden layer; None means 4 * dim.
        out_dim: output channels; None means dim.
        act_layer: activation.
        kernel_size: side of the depthwise convolution, odd.
        drop: dropout before and after the last Linear.
    """

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
        super().__init__()
        hidden_dim = 4 * dim if hidden_dim is None else hidden_dim
        out_dim = dim if out_dim is None else out_dim
        check_positive("hidden_dim", hidden_dim)
        check_positive("out_dim", out_dim)
        self.dim = dim
        self.fc1 = nn.Linear(dim, hidden_dim, device=device, dtype=dtype)
        self.dwconv = depthwise_conv(hidden_dim, kernel_size=kernel_size, device=device, dtype=dtype)
        self.act = act_layer()
        self.drop = nn.Dropout(drop)
        self.fc2 = nn.Linear(hidden_dim, out_dim, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init_linear(self.fc1)
        init_linear(self.fc2)
        init_convolution(self.dwconv)

    def forward(self, x: Tensor) -> Tensor:
        check_map(x, self.dim)
        return self.drop(self.fc2(self.drop(self.act(convolve(self.dwconv, self.fc1(x))))))

    def pointwise(self, x: Tensor) -> Tensor:
        """The same without the convolution, for tokens ``(..., C)`` that have no place in a map."""
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))
