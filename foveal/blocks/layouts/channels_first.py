"""Blocks in convolutional networks, whose maps are ``(B, C, H, W)``."""

from torch import Tensor

from foveal.blocks.layouts.adapter import Adapter


class ChannelsFirst(Adapter):
    """A block over ``(B, C, H, W)``, at any H, W >= 1. Output channels, strides and sizes are the block's.

    Copies nothing: of a result in PyTorch's channels_last memory format, later convolutions make the best.

    Args:
        block: any module ``(B, H, W, C) -> (B, H', W', C')``.

    Example:
        >>> ChannelsFirst(ConvGLU(64, out_dim=128))(torch.randn(2, 64, 20, 30)).shape
        torch.Size([2, 128, 20, 30])
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4:
            raise ValueError(f"x must have shape (B, C, H, W), got {tuple(x.shape)}")
        return self.block(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
