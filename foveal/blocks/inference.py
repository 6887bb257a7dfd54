"""What inference on the CPU may do that training may not: slice a batch, take layers apart, join them to others."""

from collections.abc import Callable
from typing import Any, TypeGuard, cast

import torch
from timm.layers import DropPath
from torch import Tensor, fx, nn
from torch.nn.modules.module import _has_any_global_hook

from foveal.ops import add_layer_norm, reference

# Of an intermediate. The allocator maps what is larger than 32 MiB anew at every call, and faulting the pages in takes
# longer than the layer that fills them; half of that was the best of 4 to 32 MiB, measured with 2 threads.
SLICE_BYTES = 16 << 20


def infers_on_cpu(x: Tensor, training: bool) -> bool:
    """Whether nobody differentiates, traces, or watches all modules (as a profiler of modules does)."""
    if training or torch.is_grad_enabled() or torch.compiler.is_compiling() or isinstance(x, fx.Proxy):
        return False
    return x.device.type == "cpu" and not _has_any_global_hook()


def is_altered(module: nn.Module) -> bool:
    """Whether calling a module, or one inside it, does more than run its class's forward.

    So it is with hooks, with a forward of the instance's own (accelerate, some adapters), and after ``.compile()``.
    """
    if module._forward_hooks or module._forward_pre_hooks or module._compiled_call_impl or "forward" in vars(module):
        return True
    for part in module._modules.values():  # noqa: SIM110 (asked hundreds of times in a pass: its generators are felt)
        if part is not None and is_altered(part):
            return True
    return False


def is_plain_linear(module: nn.Module) -> bool:
    """Whether calling a module means ``F.linear`` of its weight and bias and nothing else."""
    return type(module) is nn.Linear and not is_altered(module)


def is_idle(module: nn.Module) -> bool:
    """Whether a module returns its input as it is: Identity, or a dropout in evaluation."""
    is_dropout = type(module) in (nn.Dropout, DropPath) and not module.training
    return (is_dropout or type(module) is nn.Identity) and not is_altered(module)


def is_plain_layer_norm(module: nn.Module) -> TypeGuard[nn.LayerNorm]:
    """Whether calling a module means ``F.layer_norm`` over channels and nothing else."""
    return type(module) is nn.LayerNorm and len(module.normalized_shape) == 1 and not is_altered(module)


def in_slices(module: nn.Module, function: Callable[[Tensor], Tensor], x: Tensor, width: int) -> Tensor:
    """``function(x)``, for a few images of ``x`` ``(B, H, W, C)`` at a time.

    The function runs the children of ``module``, treats images one by one, and is widest where it has ``width``
    channels. In inference on the CPU, a slice is as many images as keep that within ``SLICE_BYTES``, at least one.
    Elsewhere, and where a child is altered, it is the whole batch.
    """
    if not infers_on_cpu(x, module.training) or any(map(is_altered, module.children())):
        return function(x)
    image_bytes = x.shape[1] * x.shape[2] * width * x.element_size()
    images = max(1, SLICE_BYTES // image_bytes)
    if images >= x.shape[0]:
        return function(x)
    return torch.cat([function(part) for part in x.split(images)])


def normalize(x: Tensor, norm: nn.Module) -> Tensor:
    """``norm(x)``; in inference on the CPU foveal's kernel runs for a plain LayerNorm."""
    return ResidualStream(x).normalize(norm)


def without_last_bias(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """``module(x)`` in two parts whose sum it is; the second is a bias ``(C,)``, or None where there is but the first.

    In inference on the CPU, a module whose class has a method of this name, beside the forward that a call runs, takes
    its last Linear apart, unless the module is altered.
    """
    if infers_on_cpu(x, module.training) and not is_altered(module):
        runs = next(cls for cls in type(module).__mro__ if "forward" in vars(cls))
        if "without_last_bias" in vars(runs):
            return cast(Any, module).without_last_bias(x)
    return module(x), None


class ResidualStream:
    """A map and the branches that are added to it: ``x + branch + ...``, the last sum left open.

    A plain LayerNorm after a sum is one pass with it in inference on the CPU, and writes it where the sum before it
    lay, if only the stream holds that.
    """

    def __init__(self, x: Tensor):
        self._total, self._is_own = x, False
        self._branch: Tensor | None = None
        self._bias: Tensor | None = None

    def add(self, branch: Tensor, bias: Tensor | None = None) -> None:
        """Add a branch, and a bias ``(C,)`` that belongs to it."""
        if self._branch is not None:
            self.total()
        self._branch, self._bias = branch, bias

    def normalize(self, norm: nn.Module) -> Tensor:
        """``norm`` of the stream."""
        x, branch = self._total, self._branch
        if not is_plain_layer_norm(norm) or not infers_on_cpu(x, norm.training):
            return norm(self.total())
        inplace = self._is_own and branch is not None and branch.dtype == x.dtype
        self._total, normed = add_layer_norm(
            x, branch, norm.weight, norm.bias, norm.eps, y_bias=self._bias, inplace=inplace
        )
        self._is_own = self._is_own or branch is not None
        self._branch = self._bias = None
        return normed

    def total(self) -> Tensor:
        """The stream as a map, which the caller may keep."""
        if self._branch is not None:
            self._total = reference.add_branch(self._total, self._branch, self._bias)
        self._branch = self._bias = None
        self._is_own = False
        return self._total
