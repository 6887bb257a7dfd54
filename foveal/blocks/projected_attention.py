"""The end that all attention blocks share: a projection and its dropout."""

import torch.nn.functional as F
from torch import Tensor, nn

from foveal.blocks.inference import is_idle, is_plain_linear


class ProjectedAttention(nn.Module):
    """``proj_drop(proj(_attended(x)))``, over ``(B, H, W, C)``; a subclass attends."""

    proj: nn.Linear
    proj_drop: nn.Dropout

    def forward(self, x: Tensor) -> Tensor:
        return self.proj_drop(self.proj(self._attended(x)))

    def without_last_bias(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """``forward(x)`` in two parts, see :func:`foveal.blocks.inference.without_last_bias`."""
        if not is_plain_linear(self.proj) or not is_idle(self.proj_drop):
            return self(x), None
        return F.linear(self._attended(x), self.proj.weight), self.proj.bias

    def _attended(self, x: Tensor) -> Tensor:
        """What proj projects, ``(B, H, W, C)``."""
        raise NotImplementedError
