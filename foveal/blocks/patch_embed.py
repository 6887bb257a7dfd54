"""Overlapping patch embedding: the stem and the downsampling between stages."""

from collections.abc import Callable

from torch import Tensor, nn

from foveal.blocks._checks import check_map, check_positive
from foveal.blocks._convolution import convolve
from foveal.blocks._initialization import init_convolution
from foveal.blocks._module import MapModule


class OverlapPatchEmbed(MapModule):
    """A strided convolution and a norm, ``(B, H, W, in_chans)`` to ``(B, ceil(H / stride), ceil(W / stride), dim)``.

    Args:
        in_chans: input channels.
        dim: output channels.
        patch_size: side of the convolution, odd, padded by half of it.
        stride: stride of the convolution.
        norm_layer: norm of the output.
    """

    def __init__(
        self,
        in_chans: int,
        dim: int,
        *,
        patch_size: int = 7,
        stride: int = 4,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_positive("stride", stride)
        if patch_size < 1 or patch_size % 2 == 0:
            raise ValueError(f"patch_size must be an odd positive integer, got {patch_size!r}")
        self.in_chans = in_chans
        self.proj = nn.Conv2d(
            in_chans, dim, patch_size, stride=stride, padding=patch_size // 2, device=device, dtype=dtype
        )
        self.norm = norm_layer(dim, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init_convolution(self.proj)

    def forward(self, x: Tensor) -> Tensor:
        check_map(x, self.in_chans)
        return self.norm(convolve(self.proj, x))
