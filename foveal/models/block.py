"""The residual block of a stage."""

from collections.abc import Sequence

from timm.layers import DropPath
from torch import Tensor, nn


class Block(nn.Module):
    """``x + drop_path(scale(mixer(norm(x))))``, then the same with the MLP, over ``(B, H, W, C)``.

    ``scale_layer`` makes a residual scale, ``dim -> nn.Module``.
    """

    def __init__(
        self, dim: int, mixer: nn.Module, mlp: nn.Module, norms: Sequence[nn.Module], scale_layer, drop_path: float
    ):
        super().__init__()
        self.norm1, self.norm2 = norms
        self.mixer = mixer
        self.mlp = mlp
        self.scale1, self.scale2 = scale_layer(dim), scale_layer(dim)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.scale1(self.mixer(self.norm1(x))))
        return x + self.drop_path(self.scale2(self.mlp(self.norm2(x))))
