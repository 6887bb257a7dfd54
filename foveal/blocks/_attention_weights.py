"""The weights of an attention, as the blocks' ``attention_weights(x)`` give them: for looking, not for speed."""

from typing import NamedTuple

from torch import Tensor


class AttentionWeights(NamedTuple):
    """What every query of a map multiplies the values with, in at least float32.

    The softmax's weights sum to one over ``window`` and ``pool`` together.

    Attributes:
        window: ``(B, H, W, heads, k, k)``, the cells of the sliding window, 0 outside the map; None without a window.
        pool: ``(B, H, W, heads, Hp, Wp)``, the pooled cells; of global attention, all cells of the map.
        positional: ``(B, H, W, heads, k, k)``, what positional attention adds to the window's weights, of either sign,
            0 outside the map; None without it.
    """

    window: Tensor | None
    pool: Tensor
    positional: Tensor | None
