"""Convolutions of channels-last maps."""

from torch import Tensor, nn

from foveal.blocks._initialization import init_convolution


def depthwise_conv(dim: int, *, kernel_size: int = 3, device=None, dtype=None) -> nn.Conv2d:
    """A k x k depthwise convolution with zero padding, which keeps the size; k is odd.

    It is PyTorch's own layer over ``(B, C, H, W)``, so that whoever adapts, prunes or counts layers knows it.
    """
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be an odd positive integer, got {kernel_size!r}")
    conv = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, device=device, dtype=dtype)
    init_convolution(conv)
    return conv


def convolve(conv: nn.Module, x: Tensor) -> Tensor:
    """A convolution over ``(B, C, H, W)`` on a map ``(B, H, W, C)``, without a copy."""
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
