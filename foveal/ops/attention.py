"""Aggregated attention: the keys of a sliding window and of a pooled map in one softmax."""

import torch
from torch import Tensor

from foveal.ops import reference
from foveal.ops._attention_door import check_arguments, check_entries
from foveal.ops._declaration import (
    declare,
    declare_gradient,
    fake_gradients,
    gradients,
    gradients_to_differentiate,
    only_wanted,
    wanted_mask,
)
from foveal.ops.backend import infers_compiled, runs_compiled, unserved_dtype
from foveal.ops.position_bias import PositionBias
from foveal.ops.tracing import shape_of

_MAX_DIM = 128


def aggregated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    *,
    window_size: int,
    scale: Tensor,
    length_scaled: bool,
    normalize: bool,
    query_embedding: Tensor | None = None,
    window_bias: Tensor | None = None,
    pool_bias: PositionBias | None = None,
    positional_tokens: Tensor | None = None,
    positional_bias: Tensor | None = None,
    input_bias: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Attend from every cell to the window around it and to a pooled map, in one softmax (equations 1-4 and 10-14).

    Equivalent, with the window cut at the border, to::

        if normalize:
            q, k, k_pool = (F.normalize(x, dim=-1) for x in (q, k, k_pool))  # one shorter than 1e-12 becomes 0
        u = (q + query_embedding) * scale[:, None]
        if length_scaled:
            u = u * log(window cells inside the map + Hp * Wp)
        near = window_scores(u, k, window_size) + window_bias
        far = einsum("bhwnd,bpnd->bhwnp", u, k_pool.flatten(1, 2)) + pool_bias
        near, far = cat([near, far], -1).softmax(-1).split([window_size**2, Hp * Wp], -1)
        near = near + einsum("bhwnd,ndc->bhwnc", q, positional_tokens) + positional_bias
        return window_sum(near, v, window_size) + einsum("bhwnp,bpnd->bhwnd", far, v_pool.flatten(1, 2))

    Args:
        q, k, v: ``(B, H, W, heads, d)`` of one dtype; strided views of one projection are fine.
        k_pool, v_pool: ``(B, Hp, Wp, heads, d)``, of q's dtype.
        window_size: side k of the window, odd.
        scale: ``(heads,)``, the factor of the logits (softplus of the temperature, or 1 / sqrt(d)).
        length_scaled: multiply the logits by the log of the number of keys a query sees.
        normalize: scale queries and keys to unit length (cosine attention).
        query_embedding: ``(heads, d)``, added to the (normalised) query of the logits.
        window_bias: ``(heads, k * k)``, added to the window's logits.
        pool_bias: bias of the pooled logits, from the query grid (H, W) to the key grid (Hp, Wp).
        positional_tokens: ``(heads, d, k * k)``; the query's product with them is added to the window's weights.
        positional_bias: ``(heads, k * k)``, added to the window's weights.
        input_bias: ``(3, heads, d)``, added to q, k and v first. The bias of the Linear that makes them, given here and
            not there, saves a pass over them in inference on the CPU.
        dropout_p: probability with which a weight of the softmax is dropped.

    Returns:
        ``(B, H, W, heads, d)`` in q's dtype; computed in float32 for half types. Parameters may have other dtypes, and
        are converted to that of the computation.
    """
    maps = {"q": q, "k": k, "v": v, "k_pool": k_pool, "v_pool": v_pool}
    parameters = {
        "scale": scale,
        "query_embedding": query_embedding,
        "window_bias": window_bias,
        "positional_tokens": positional_tokens,
        "positional_bias": positional_bias,
        "input_bias": input_bias,
    }
    check_arguments(window_size, maps, parameters, pool_bias)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")

    table, rows, columns = pool_bias or (None, None, None)
    pooled = (k_pool, v_pool, scale, query_embedding, window_bias, table, rows, columns)
    others = (*pooled, positional_tokens, positional_bias)
    options = (window_size, length_scaled, normalize)
    unsupported = _unsupported(q, k_pool, dropout_p)
    if input_bias is not None:
        if infers_compiled("aggregated_attention", q, k, v, *others, input_bias, unsupported=unsupported):
            return torch.ops.foveal.aggregated_attention_with_input_bias(input_bias, q, k, v, *others, *options)
        q, k, v = _biased(input_bias, q, k, v)
    if runs_compiled("aggregated_attention", q, [*unserved_dtype(q), *unsupported]):
        return torch.ops.foveal.aggregated_attention(q, k, v, *others, *options)[0]
    check_entries(pool_bias)
    return reference.aggregated_attention(q, k, v, *others, *options, dropout_p)


def attention_weights(
    q: Tensor,
    k: Tensor,
    k_pool: Tensor,
    *,
    window_size: int,
    scale: Tensor,
    length_scaled: bool,
    normalize: bool,
    query_embedding: Tensor | None = None,
    window_bias: Tensor | None = None,
    pool_bias: PositionBias | None = None,
    positional_tokens: Tensor | None = None,
    positional_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What :func:`aggregated_attention` multiplies the values with, by its definition: for looking, not for speed.

    Returns:
        the softmax's weights of the window ``(B, H, W, heads, k * k)``, 0 outside the map, and of the pooled map
        ``(B, H, W, heads, Hp * Wp)``; what positional attention adds to the window's, or None. In at least float32.
    """
    named = {
        "scale": scale,
        "query_embedding": query_embedding,
        "window_bias": window_bias,
        "positional_tokens": positional_tokens,
        "positional_bias": positional_bias,
    }
    check_arguments(window_size, {"q": q, "k": k, "k_pool": k_pool}, named, pool_bias)
    check_entries(pool_bias)
    bias = pool_bias or (None, None, None)
    parameters = scale, query_embedding, window_bias, *bias, positional_tokens, positional_bias
    options = window_size, length_scaled, normalize
    return reference.aggregated_attention_weights(q, k, k_pool, *parameters, *options)[:3]


def _biased(input_bias: Tensor, *maps: Tensor) -> list[Tensor]:
    return [reference.biased(x, bias) for x, bias in zip(maps, input_bias, strict=True)]


def _unsupported(q: Tensor, k_pool: Tensor, dropout_p: float) -> list[str]:
    reasons = []
    if 0 in shape_of(k_pool)[1:3]:
        reasons.append("a pooled map without cells is not served")
    if dropout_p > 0:
        reasons.append("attention dropout is not served")
    if (dim := shape_of(q)[-1]) > _MAX_DIM:
        reasons.append(f"a head dimension of {dim} is not served (at most {_MAX_DIM})")
    return reasons


# The tensors of the schema, and where among them the ones without a gradient stand.
_TENSORS = (
    "Tensor q, Tensor k, Tensor v, Tensor k_pool, Tensor v_pool, Tensor scale, Tensor? query_embedding, "
    "Tensor? window_bias, Tensor? pool_bias, Tensor? pool_rows, Tensor? pool_columns, "
    "Tensor? positional_tokens, Tensor? positional_bias"
)
_COUNT = 13
_INDEX_MASK = 1 << 9 | 1 << 10
_OPTIONS = "int window_size, bool length_scaled, bool normalize"


def _default(*args) -> tuple[Tensor, Tensor]:
    out, lse = reference.aggregated_attention_with_lse(*args)
    return out.contiguous(), lse.contiguous()


def _default_with_input_bias(input_bias: Tensor, q: Tensor, k: Tensor, v: Tensor, *args) -> Tensor:
    return reference.aggregated_attention(*_biased(input_bias, q, k, v), *args).contiguous()


def _fake(q: Tensor, *args) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))


def _flops(q, k, v, k_pool, v_pool, *args, out_shape=None) -> int:
    batch, height, width, heads, dim = q
    positional_tokens, window_size = args[6], args[8]
    keys = window_size**2 * (3 if positional_tokens is not None else 2) + 2 * k_pool[1] * k_pool[2]
    return 2 * batch * height * width * heads * dim * keys


def _backward(grad, out, lse, *args) -> tuple[Tensor, ...]:
    inputs, options, wanted = args[:_COUNT], args[_COUNT:-1], args[-1]
    return gradients(lambda *x: reference.aggregated_attention(*x, *options), inputs, wanted, grad)


def _setup_context(ctx, inputs, output) -> None:
    ctx.options = inputs[_COUNT:]
    ctx.save_for_backward(*output, *inputs[:_COUNT])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad, grad_lse):
    if grad is None:
        return (None,) * (_COUNT + len(ctx.options))
    wanted = wanted_mask(ctx.needs_input_grad[:_COUNT]) & ~_INDEX_MASK
    if torch.is_grad_enabled():
        inputs = ctx.saved_tensors[2:]
        grads = gradients_to_differentiate(
            lambda *x: reference.aggregated_attention(*x, *ctx.options), inputs, wanted, grad
        )
        return *grads, *(None for _ in ctx.options)
    grads = torch.ops.foveal.aggregated_attention_backward(grad, *ctx.saved_tensors, *ctx.options, wanted)
    return *only_wanted(grads, wanted), *(None for _ in ctx.options)


declare(
    "aggregated_attention",
    f"({_TENSORS}, {_OPTIONS}) -> (Tensor, Tensor)",
    default=_default,
    fake=_fake,
    flops=_flops,
)
declare(
    "aggregated_attention_with_input_bias",
    f"(Tensor input_bias, {_TENSORS}, {_OPTIONS}) -> Tensor",
    default=_default_with_input_bias,
    fake=lambda input_bias, q, *args: q.new_empty(q.shape),
    flops=lambda input_bias, *args, out_shape=None: _flops(*args),
)
declare(
    "aggregated_attention_backward",
    f"(Tensor grad, Tensor out, Tensor lse, {_TENSORS}, {_OPTIONS}, int wanted) -> ({', '.join(['Tensor'] * _COUNT)})",
    default=_backward,
    fake=lambda grad, out, lse, *args: fake_gradients(args[:_COUNT], args[-1], grad),
    flops=lambda grad, out, lse, *args, out_shape=None: 2 * _flops(*args[:-1]),
)
declare_gradient("aggregated_attention", _setup_context, _autograd)
