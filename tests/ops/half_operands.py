"""What tensor cores make of aggregated_attention in half types: the same in plain PyTorch, as a bound on errors."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from foveal.ops import PositionBias, reference
from tests.ops.helpers import CAP, SLACK, as_float64, assert_as_accurate, results

HALF = (torch.float16, torch.bfloat16)


class _Rounded(torch.autograd.Function):
    """Rounds a value, or its gradient, to a half type."""

    @staticmethod
    def forward(ctx, x, dtype, what):
        ctx.dtype = dtype if what == "gradient" else x.dtype
        return x.to(dtype).to(x.dtype) if what == "value" else x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.to(ctx.dtype).to(grad.dtype), None, None


def attention_with_half_operands(
    q, k, v, k_pool, v_pool, scale, query_embedding, window_bias, table, rows, columns, tokens, positional_bias,
    window_size, length_scaled, normalize, dropout_p=0.0,
):  # fmt: skip
    """The reference, but every product of activations has operands of their half type, in backward too."""
    dtype, grid = q.dtype, q.shape[1:3]
    value, gradient = (lambda x: _Rounded.apply(x, dtype, "value")), (lambda x: _Rounded.apply(x, dtype, "gradient"))
    q, k, v, k_pool, v_pool, scale = (x.float() for x in (q, k, v, k_pool, v_pool, scale))
    if normalize:
        q, k, k_pool = (F.normalize(x, dim=-1, eps=1e-12) for x in (q, k, k_pool))
    query = (q if query_embedding is None else q + query_embedding) * scale[:, None]
    if length_scaled:
        length = reference.inside_map(grid, window_size, q.device).sum(-1) + k_pool.shape[1] * k_pool.shape[2]
        query = query * length.float().log()[:, :, None, None]
    query = value(query)
    near = gradient(reference.window_scores(query, value(k), window_size))
    far = gradient(torch.einsum("bhwnd,bpnd->bhwnp", query, value(k_pool).flatten(1, 2)))
    if window_bias is not None:
        near = near + window_bias
    if table is not None:
        far = far + PositionBias(table.float(), rows, columns).dense().unflatten(1, grid).permute(1, 2, 0, 3)
    cells = near.shape[-1]
    near, far = torch.cat([near, far], dim=-1).softmax(dim=-1).split([cells, far.shape[-1]], dim=-1)
    if tokens is not None:
        near = near + gradient(torch.einsum("bhwnd,ndc->bhwnc", value(q), value(tokens.float())))
    if positional_bias is not None:
        near = near + positional_bias
    out = reference.window_sum(value(near), v, window_size)
    return (out + torch.einsum("bhwnp,bpnd->bhwnd", value(far), v_pool.flatten(1, 2))).to(dtype)


def assert_accurate(
    function: Callable, inputs: Sequence[Tensor | None], running: Callable[[], AbstractContextManager] = nullcontext
) -> Any:
    """As ``assert_as_accurate``; half types on a GPU against plain PyTorch with the same operands."""
    dtype = inputs[0].dtype
    if dtype not in HALF or (running is nullcontext and not inputs[0].is_cuda):
        return assert_as_accurate(function, inputs, running)
    with running() as context:
        ours = results(function, inputs, "compiled")
    with mock.patch.object(reference, "aggregated_attention", attention_with_half_operands):
        plain = results(function, inputs, "reference")
    exact = results(function, [as_float64(x) for x in inputs], "reference", dtype)
    for index, (x, same_operands, truth) in enumerate(zip(ours, plain, exact, strict=True)):
        assert x.shape == truth.shape
        assert x.dtype == same_operands.dtype
        if truth.numel() == 0:
            continue
        scale = truth.abs().max().clamp(min=1)
        error, bound = ((y.double() - truth).abs().max() for y in (x, same_operands))
        assert error <= 2 * bound + SLACK[dtype] * scale, f"result {index}: {error:.2e}, plain {bound:.2e}"
        assert error <= CAP[dtype] * scale, f"result {index}: {error:.2e} of {scale:.2e}"
    return context
