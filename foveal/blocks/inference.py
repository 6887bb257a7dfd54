"""What inference on the CPU may do that training may not: slice a batch, take layers apart, join them to others."""

from collections.abc import Callable
from typing import TypeGuard

import torch
from torch import Tensor, fx, nn

from foveal.ops import add_layer_norm

# Of an intermediate. The allocator maps what is larger than 32 MiB anew at every call, and faulting the pages in takes
# longer than the layer that fills them; half of that was the best of 4 to 32 MiB, measured with 2 threads.
SLICE_BYTES = 16 << 20


def infers_on_cpu(x: Tensor, training: bool) -> bool:
    if training or torch.is_grad_enabled() or torch.compiler.is_compiling() or isinstance(x, fx.Proxy):
        return False
    return x.device.type == "cpu"


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody watches what goes in or out of a module or of one inside it."""
    return any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def is_plain_linear(module: nn.Module) -> bool:
    """Whether calling a module means ``F.linear`` of its weight and bias and nothing else."""
    return type(module) is nn.Linear and not has_hooks(module)


def is_plain_layer_norm(module: nn.Module) -> TypeGuard[nn.LayerNorm]:
    """Whether calling a module means ``F.layer_norm`` over channels and nothing else."""
    return type(module) is nn.LayerNorm and len(module.normalized_shape) == 1 and not has_hooks(module)


def in_slices(module: nn.Module, function: Callable[[Tensor], Tensor], x: Tensor, width: int) -> Tensor:
    """``function(x)``, for a few images of ``x`` ``(B, H, W, C)`` at a time.

    The function runs the children of ``module``, treats images one by one, and is widest where it has ``width``
    channels. In inference on the CPU, a slice is as many images as keep that within ``SLICE_BYTES``, at least one.
    Elsewhere, and where a child has a hook, it is the whole batch.
    """
    if not infers_on_cpu(x, module.training) or any(map(has_hooks, module.children())):
        return function(x)
    image_bytes = x.shape[1] * x.shape[2] * width * x.element_size()
    images = max(1, SLICE_BYTES // image_bytes)
    if images >= x.shape[0]:
        return function(x)
    return torch.cat([function(part) for part in x.split(images)])


def normalize(x: Tensor, norm: nn.Module) -> Tensor:
    """``norm(x)``; in inference on the CPU foveal's kernel runs for a plain LayerNorm."""
    return add_and_normalize(x, None, norm)[1]


def add_and_normalize(x: Tensor, branch: Tensor | None, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """``x + branch`` (x for None) and ``norm`` of it, for a plain LayerNorm in one pass in inference on the CPU."""
    if is_plain_layer_norm(norm) and infers_on_cpu(x, norm.training):
        return add_layer_norm(x, branch, norm.weight, norm.bias, norm.eps)
    if branch is not None:
        x = x + branch
    return x, norm(x)
