"""What every adapter has in common: the block inside."""

from typing import Any

from torch import nn

from foveal.blocks._module import MapModule


class Adapter(MapModule):
    """A block of foveal, ``(B, H, W, C) -> (B, H, W, C')``, seen through the eyes of a network of another layout."""

    def __init__(self, block: nn.Module):
        super().__init__()
        if not isinstance(block, nn.Module):
            raise TypeError(f"block must be a torch.nn.Module over (B, H, W, C), got {block!r}")
        self.block: Any = block

    # Hosts scale the initial weights of these two by name.

    @property
    def fc2(self) -> nn.Module:
        return self.block.fc2

    @property
    def proj(self) -> nn.Module:
        return self.block.proj
