"""Checks at the door: what is wrong with an argument, what was got and what is accepted."""

from collections.abc import Sequence

import torch
from torch import Tensor

from foveal.ops.tracing import shape_of


def check_shape(name: str, x: Tensor, expected: Sequence[int], axes: str) -> None:
    """Raise unless ``x`` has the expected shape; ``axes`` spells it out for the reader."""
    shape = shape_of(x)
    if shape != expected and tuple(shape) != tuple(expected):
        raise ValueError(f"{name} must have shape {axes} = {tuple(expected)}, got {tuple(shape)}")


def check_dim(name: str, x: Tensor, axes: str) -> None:
    """Raise unless ``x`` has as many dimensions as ``axes`` names, like ``"(B, H, W, C)"``."""
    if x.dim() != axes.removesuffix(",)").count(",") + 1:
        raise ValueError(f"{name} must have shape {axes}, got {tuple(x.shape)}")


def check_floating(name: str, x: Tensor) -> None:
    if not x.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {x.dtype}")


def check_parameter(name: str, x: Tensor | None, expected: Sequence[int], axes: str) -> None:
    """Raise unless ``x``, where it is given, is floating point and has the expected shape."""
    if x is not None:
        check_floating(name, x)
        check_shape(name, x, expected, axes)


def check_index(name: str, x: Tensor, expected: Sequence[int], axes: str) -> None:
    if x.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be int64 or int32, got {x.dtype}")
    check_shape(name, x, expected, axes)


def check_same_dtype(**tensors: Tensor) -> None:
    """Raise unless all tensors share the dtype of the first, which must be floating point."""
    (first, reference), *others = tensors.items()
    check_floating(first, reference)
    for name, x in others:
        if x.dtype != reference.dtype:
            raise TypeError(f"{name} must have the dtype of {first}, {reference.dtype}, got {x.dtype}")


def check_same_device(x: Tensor, **others: Tensor | None) -> None:
    """Raise unless all tensors lie where ``x`` does: a kernel takes their addresses as they are."""
    device = x.device
    for name, other in others.items():
        if other is not None and other.device != device:
            raise ValueError(f"{name} must be on {device} like the activations, got {other.device}")


def check_window_size(window_size: int) -> None:
    if not isinstance(window_size, int) or not 1 <= window_size < 1 << 15 or window_size % 2 == 0:
        raise ValueError(f"window_size must be an odd positive integer of at most 32767, got {window_size!r}")


def check_grid(name: str, grid: Sequence[int]) -> None:
    if (
        not isinstance(grid, Sequence)
        or len(grid) != 2
        or not all(isinstance(side, (int, torch.SymInt)) for side in grid)
        or min(grid) < 1
    ):
        raise ValueError(f"{name} must be two positive integers (rows, columns), got {grid!r}")


def check_choice(name: str, value: object, accepted: Sequence[object]) -> None:
    if value not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, accepted))}, got {value!r}")
