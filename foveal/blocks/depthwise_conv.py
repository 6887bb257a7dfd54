"""A depthwise convolution over channels-last maps."""

from torch import Tensor, nn

from foveal.blocks._initialization import init_convolution


class DepthwiseConv(nn.Conv2d):
    """A k x k depthwise convolution with zero padding, ``(B, H, W, C)`` to the same shape.

    Args:
        dim: channels C.
        kernel_size: side k, odd.
    """

    def __init__(self, dim: int, *, kernel_size: int = 3, device=None, dtype=None):
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be an odd positive integer, got {kernel_size!r}")
        super().__init__(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        init_convolution(self)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
