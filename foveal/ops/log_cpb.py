"""The table of a log-spaced continuous position bias, at any size in bounded memory."""

from functools import partial

import torch
from torch import Tensor

from foveal.ops import reference
from foveal.ops._checks import check_dim, check_floating, check_parameter, check_same_device
from foveal.ops._declaration import (
    declare,
    declare_gradient,
    fake_gradients,
    gradients,
    gradients_to_differentiate,
    only_wanted,
    wanted_mask,
)
from foveal.ops.backend import circumstances, current_backend, runs_compiled
from foveal.ops.tracing import shape_of

_HIDDEN_ELEMENTS = 1 << 22  # of the hidden layer at a time: 16 MB in float32


def log_cpb_table(
    rows: Tensor, columns: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor
) -> Tensor:
    """Evaluate the log-CPB MLP (equation 11) on the product of a set of row and a set of column coordinates.

    Equivalent to running ``Linear(2, hidden) -> ReLU -> Linear(hidden, heads)`` on ``cartesian_prod(rows, columns)``.
    The first layer separates into a part of the row and a part of the column; the hidden layer is made for a few rows
    at a time, and again in the backward pass, so half a million entries need no gigabytes.

    Args:
        rows: ``(Th,)`` log-spaced coordinates.
        columns: ``(Tw,)`` likewise.
        weight1, bias1: ``(hidden, 2)`` and ``(hidden,)``, of the first layer.
        weight2, bias2: ``(heads, hidden)`` and ``(heads,)``, of the second layer.

    Returns:
        ``(heads, Th, Tw)`` in float32, or float64 where weight2 is. The others are converted to that. Of infinite
        coordinates the kernels' gradients may be NaN where the definition's are infinite.
    """
    check_dim("rows", rows, "(Th,)")
    check_dim("columns", columns, "(Tw,)")
    check_dim("weight2", weight2, "(heads, hidden)")
    heads, hidden = shape_of(weight2)
    check_floating("rows", rows)
    check_floating("columns", columns)
    check_parameter("weight1", weight1, (hidden, 2), "(hidden, 2)")
    check_parameter("bias1", bias1, (hidden,), "(hidden,)")
    check_floating("weight2", weight2)
    check_parameter("bias2", bias2, (heads,), "(heads,)")
    check_same_device(weight2, rows=rows, columns=columns, weight1=weight1, bias1=bias1, bias2=bias2)
    if runs_compiled("log_cpb_table", weight2) or _may_hide(weight2):
        return torch.ops.foveal.log_cpb_table(rows, columns, weight1, bias1, weight2, bias2)
    return reference.log_cpb_table(rows, columns, weight1, bias1, weight2, bias2)


def _may_hide(x: Tensor) -> bool:
    """Whether the op may stand in for the definition even without kernels: it needs less memory."""
    return current_backend() == "auto" and not circumstances(x)


def _row_chunks(rows: Tensor, columns: Tensor, hidden: int) -> list[Tensor]:
    return list(rows.split(max(1, _HIDDEN_ELEMENTS // max(1, columns.shape[0] * hidden))))


def _default(rows: Tensor, columns: Tensor, *parameters: Tensor) -> Tensor:
    chunks = _row_chunks(rows, columns, len(parameters[0]))
    return torch.cat([reference.log_cpb_table(chunk, columns, *parameters) for chunk in chunks], dim=1).contiguous()


def _fake(rows, columns, weight1, bias1, weight2, bias2) -> Tensor:
    dtype = torch.promote_types(weight2.dtype, torch.float32)
    return weight2.new_empty((weight2.shape[0], rows.shape[0], columns.shape[0]), dtype=dtype)


def _flops(rows, columns, weight1, bias1, weight2, bias2, *, out_shape=None) -> int:
    return 2 * rows[0] * columns[0] * weight2[0] * weight2[1]


def _backward(grad: Tensor, rows: Tensor, columns: Tensor, *parameters_and_wanted) -> tuple[Tensor, ...]:
    *parameters, wanted = parameters_and_wanted
    chunks = _row_chunks(rows, columns, len(parameters[0]))
    sums: tuple[Tensor, ...] = ()
    for chunk, part in zip(chunks, grad.split([len(c) for c in chunks], dim=1), strict=True):
        grads = gradients(
            lambda *values, chunk=chunk: reference.log_cpb_table(chunk, columns, *values), parameters, wanted, part
        )
        sums = tuple(a + b for a, b in zip(sums, grads, strict=True)) if sums else grads
    return sums


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _autograd(ctx, grad):
    wanted = wanted_mask(ctx.needs_input_grad[2:])
    if torch.is_grad_enabled():
        rows, columns, *parameters = ctx.saved_tensors
        definition = partial(reference.log_cpb_table, rows, columns)
        return None, None, *gradients_to_differentiate(definition, parameters, wanted, grad)
    grads = torch.ops.foveal.log_cpb_table_backward(grad, *ctx.saved_tensors, wanted)
    return None, None, *only_wanted(grads, wanted)


_TENSORS = "Tensor rows, Tensor columns, Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2"

declare("log_cpb_table", f"({_TENSORS}) -> Tensor", default=_default, fake=_fake, flops=_flops)
declare(
    "log_cpb_table_backward",
    f"(Tensor grad, {_TENSORS}, int wanted) -> (Tensor, Tensor, Tensor, Tensor)",
    default=_backward,
    fake=lambda grad, rows, columns, *rest: fake_gradients(rest[:-1], rest[-1], grad),
    flops=lambda grad, *args, out_shape=None: 2 * _flops(*args[:-1]),
)
declare_gradient("log_cpb_table", _setup_context, _autograd)


def _fake_offsets(like: Tensor, queries: int, keys: int) -> tuple[Tensor, Tensor]:
    lowest, highest, step = reference.offset_range(queries, keys)
    count = (highest - lowest) // step + 1
    index = like.new_empty((queries, keys), dtype=torch.int64)
    return like.new_empty((count,), dtype=torch.float32), index


# For compiled graphs, where it keeps the arithmetic of sizes out of the graph; `like` gives the device.
declare(
    "relative_offsets",
    "(Tensor like, SymInt queries, SymInt keys) -> (Tensor, Tensor)",
    default=lambda like, queries, keys: reference.relative_offsets(queries, keys, like.device),
    fake=_fake_offsets,
)
