"""Work on a few images at a time, so that no intermediate is larger than what the allocator keeps."""

from collections.abc import Callable

import torch
from torch import Tensor

from foveal.ops.tracing import shape_of

# Of an intermediate. The allocator maps what is larger than 32 MiB anew at every call, and faulting the pages in takes
# longer than the layer that fills them; half of that was the best of 4 to 32 MiB, measured with 2 threads.
SLICE_BYTES = 16 << 20


def in_slices(function: Callable[[Tensor], Tensor], x: Tensor, width: int) -> Tensor:
    """``function(x)``, for as many images of ``x`` ``(B, H, W, C)`` at a time as keep its widest map within the bytes.

    The function treats images one by one, and has ``width`` channels where it is widest.
    """
    batch, height, grid_width, _ = shape_of(x)
    images = max(1, SLICE_BYTES // max(1, height * grid_width * width * x.element_size()))
    return function(x) if images >= batch else torch.cat([function(part) for part in x.split(images)])
