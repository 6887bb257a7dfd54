"""timm's blocks of windowed attention, with an ``attn`` that sees the whole map instead of windows."""

from typing import Any

from timm.models.maxxvit import PartitionAttention2d, PartitionAttentionCl
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from torch import Tensor


class _WholeMapSwin:
    attn: Any
    input_resolution: Any

    def _attn(self, x: Tensor) -> Tensor:
        return self.attn(x)

    def get_attn_mask(self, *args, **kwargs) -> None:
        """None: there are no shifted windows."""

    def set_input_size(self, feat_size: tuple[int, int], window_size, always_partition: bool | None = None) -> None:
        self.input_resolution = feat_size


class _WholeMapMaxxVit:
    attn: Any

    def _partition_attn(self, x: Tensor) -> Tensor:
        return self.attn(x)

    def set_partition_size(self, partition_size: tuple[int, int]) -> None:
        """Nothing depends on it."""


class WholeMapSwinBlock(_WholeMapSwin, SwinTransformerBlock):
    """A Swin block whose ``attn`` maps ``(B, H, W, C)``."""


class WholeMapSwinV2Block(_WholeMapSwin, SwinTransformerV2Block):
    """A SwinV2 block whose ``attn`` maps ``(B, H, W, C)``."""


class WholeMapPartitionAttentionCl(_WholeMapMaxxVit, PartitionAttentionCl):
    """A channels-last half of a MaxViT block, whose ``attn`` maps ``(B, H, W, C)``."""


class WholeMapPartitionAttention2d(_WholeMapMaxxVit, PartitionAttention2d):
    """A channels-first half of a MaxViT block, whose ``attn`` maps ``(B, C, H, W)``."""


_CLASSES: dict[type, type] = {
    SwinTransformerBlock: WholeMapSwinBlock,
    SwinTransformerV2Block: WholeMapSwinV2Block,
    PartitionAttentionCl: WholeMapPartitionAttentionCl,
    PartitionAttention2d: WholeMapPartitionAttention2d,
}


def check_windows(block: Any) -> None:
    """Raise unless it is known how a block cuts its map into windows; a subclass may do it in its own way."""
    if type(block) not in _CLASSES and not isinstance(block, _WholeMapSwin | _WholeMapMaxxVit):
        raise ValueError(f"foveal does not know how {type(block).__name__} cuts its map into windows")


def see_whole_maps(block: Any) -> None:
    """Leave the partition into windows out of a block, in place: it keeps its parts, their names and its order."""
    if type(block) in _CLASSES:
        block.__class__ = _CLASSES[type(block)]
        if hasattr(block, "attn_mask"):  # of shifted windows
            block.attn_mask = None
