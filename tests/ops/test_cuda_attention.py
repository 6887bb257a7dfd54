"""The CUDA kernels of aggregated_attention on the host: tiles, chunks, the band, reductions, indices."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from foveal import ops
from foveal.ops import reference
from tests.ops.cuda_emulator import emulated, needs_emulator
from tests.ops.half_operands import HALF, assert_accurate
from tests.ops.helpers import results
from tests.ops.test_attention import (
    CASES,
    OPTIONAL,
    Case,
    dense_bias,
    key_bias,
    make,
    masked,
    raw_arguments,
    scattered_bias,
)
from tests.ops.test_cuda_emulated import emulated_in_poisoned_memory

pytestmark = needs_emulator
KERNELS = {"aggregated_attention", "aggregated_attention_backward"}

# Tiles beyond the map and past it, several images and several blocks of them, pooled keys past one chunk of 64 (of 32
# and of 16 for long rows), every head dimension that kernels are made for, windows with and without the band.
EMULATED = [*CASES[:5], CASES[5]._replace(heads=1), *CASES[7:8], CASES[9], *CASES[11:]]
EMULATED += [Case((9, 10), (8, 9), heads=1), Case((9, 5), (5, 7), heads=1, dim=100, batch=1)]
EMULATED += [
    Case((3, 11), (3, 3), dim=64, batch=1),
    Case((10, 6), (3, 2), dim=30),
    Case((4, 9), (2, 3), dim=12, window=5),
]


def emulated_results(function, inputs):
    with emulated_in_poisoned_memory() as ran:
        found = results(function, inputs, "compiled")
    assert ran == (KERNELS if len(found) > 1 else KERNELS - {"aggregated_attention_backward"})
    return found


def assert_emulated_is_accurate(function, inputs):
    ran = assert_accurate(function, inputs, emulated_in_poisoned_memory)
    assert ran == KERNELS


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("case", EMULATED, ids=str)
def test_accuracy(case, dtype):
    assert_emulated_is_accurate(*make(case, dtype, torch.float32))


@pytest.mark.parametrize("bias", [scattered_bias, dense_bias, key_bias])
def test_any_index_of_the_pooled_bias(bias):
    assert_emulated_is_accurate(*make(Case((5, 9), (2, 3)), bias=bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "without",
    [*((name,) for name in OPTIONAL), OPTIONAL],
    ids="-".join,
)
def test_optional_inputs(without, dtype):
    assert_emulated_is_accurate(*make(Case((4, 5), (2, 2), dim=12), dtype, torch.float32, without=without))


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_masked_keys(dtype):
    assert_emulated_is_accurate(*masked(dtype, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("length_scaled", "normalize"), [(True, False), (False, True), (False, False)])
def test_options(length_scaled, normalize, dtype):
    function, tensors = make(Case((5, 6), (2, 3), batch=1), dtype, torch.float32)
    with torch.no_grad():
        tensors[2].mul_(0.3)  # the scale: without norms, logits are large
    assert_emulated_is_accurate(partial(function, length_scaled=length_scaled, normalize=normalize), tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wanted", [1 << i for i in range(8) if i != 2] + [0b11, 0b10000001])
def test_gradients_one_by_one(wanted, dtype):
    function, tensors = make(Case((3, 10), (2, 3), batch=1), dtype, torch.float32)
    tensors = [x.detach().requires_grad_(bool(wanted >> i & 1)) for i, x in enumerate(tensors)]
    assert_emulated_is_accurate(function, tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_of_the_scale(dtype):
    """Scaling logits is scaling queries: the gradient is the sum of q . dq, its error a part of that of |q . dq|."""
    maps = [torch.randn(2, 9, 10, 2, 24).to(dtype).requires_grad_() for _ in range(3)]
    pooled = [torch.randn(2, 5, 4, 2, 24).to(dtype) for _ in range(2)]
    scale = torch.tensor([0.1, 0.2]).requires_grad_()

    def function(q, k, v, scale):
        options = {"window_size": 3, "scale": scale, "length_scaled": True, "normalize": False}
        return ops.aggregated_attention(q, k, v, *(x.to(q) for x in pooled), **options)

    ours = emulated_results(function, [*maps, scale])[-1]
    doubles = [x.detach().double().requires_grad_() for x in (*maps, scale)]
    _, grad_q, *_, exact = results(function, doubles, "reference", dtype)
    terms = (doubles[0] * grad_q).abs().sum(dim=(0, 1, 2, 4)) / scale
    assert ((ours - exact).abs() <= 8 * torch.finfo(dtype).eps * terms).all()


@pytest.mark.parametrize("parameter_dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_of_another_dtype(dtype, parameter_dtype):
    function, tensors = make(Case((3, 4), (2, 2)), dtype, parameter_dtype)
    ours, plain = emulated_results(function, tensors), results(function, tensors, "reference")
    for x, expected in zip(ours, plain, strict=True):
        assert x.dtype == expected.dtype
        scale = expected.abs().max().double().item()
        coarsest = max(torch.finfo(t).eps for t in (dtype, parameter_dtype))
        torch.testing.assert_close(x, expected, rtol=0, atol=4 * coarsest * max(scale, 1))


def test_parameters_in_double():
    function, tensors = make(Case((3, 4), (2, 2)))
    tensors = [x.detach().requires_grad_() for x in tensors]
    doubles = [x.detach().to(torch.float64 if i > 1 else x.dtype).requires_grad_() for i, x in enumerate(tensors)]
    for x, expected in zip(emulated_results(function, doubles), emulated_results(function, tensors), strict=True):
        assert x.float().equal(expected)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_log_sum_exp(dtype):
    arguments = raw_arguments(Case((9, 10), (8, 9), heads=1), dtype, torch.float32)
    with emulated():
        lse = torch.ops.foveal.aggregated_attention(*arguments)[1]
    expected = reference.aggregated_attention_with_lse(*arguments)[1]
    torch.testing.assert_close(lse, expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_zero_vectors_and_large_logits(dtype):
    """Vectors of length zero cannot be normalised; the largest logit must not overflow."""
    function, tensors = make(Case((4, 5), (2, 2)), dtype, torch.float32)
    with torch.no_grad():
        tensors[0][:, 1] = 0
        tensors[1][:, 0] = 0
        tensors[2].mul_(300 if dtype == torch.float32 else 30)
    inputs = [x.detach() for x in tensors]
    ours, plain = emulated_results(function, inputs)[0], results(function, inputs, "reference")[0]
    torch.testing.assert_close(
        ours, plain, rtol=2 * torch.finfo(dtype).eps + 1e-4, atol=1e-3 + 8 * torch.finfo(dtype).eps
    )
    tensors[0].requires_grad_(False)  # of a vector of length zero the gradient is 1e12 times that of its direction
    tensors[1].requires_grad_(False)
    assert all(x.isfinite().all() for x in emulated_results(function, tensors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_stays_where_it_belongs(dtype):
    function, tensors = make(Case((5, 9), (2, 2), batch=1, heads=1), dtype, torch.float32)
    inputs = [x.detach() for x in tensors]
    clean = emulated_results(function, inputs)[0]
    inputs[0] = inputs[0].clone()
    inputs[0][0, 2, 4, 0] = float("nan")  # a query
    out = emulated_results(function, inputs)[0]
    assert out[0, 2, 4].isnan().all()
    assert out.isnan().sum() == out.shape[-1]
    assert out[0, 2, 5].equal(clean[0, 2, 5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("dim", "view"),
    [
        (12, lambda x: x[:, ::2, 1:]),
        (12, lambda x: x.transpose(1, 2)),
        (12, lambda x: x.flip(-1)),
        (12, lambda x: x[:1].expand(3, -1, -1, -1, -1)),
        (12, lambda x: x[..., 1:]),
        # Rows of whole words that begin between words: all at the same place, or at several.
        (24, lambda x: F.pad(x.flatten(), (1, 0))[1:].view(x.shape)),
        (25, lambda x: x[..., 1:]),
    ],
)
def test_strided_inputs_and_gradients(dim, view, dtype):
    q, k, v = (torch.randn(2, 6, 8, 1, dim).to(dtype).requires_grad_() for _ in range(3))
    batch, dim = view(q).shape[0], view(q).shape[-1]
    k_pool, v_pool = (torch.randn(batch, 2, 2, 1, dim).to(dtype).requires_grad_() for _ in range(2))

    def function(*x):
        views = [view(t) for t in x[:3]]
        out = ops.aggregated_attention(
            *views, *x[3:], window_size=3, scale=torch.ones(1), length_scaled=True, normalize=True
        )
        return out.transpose(1, 3)  # so that the gradient arrives strided too

    assert_emulated_is_accurate(function, [q, k, v, k_pool, v_pool])


def test_runs_repeat_bit_for_bit():
    function, tensors = make(Case((10, 9), (3, 3)), torch.bfloat16, torch.float32)
    for first, again in zip(*(emulated_results(function, tensors) for _ in range(2)), strict=True):
        assert first.equal(again)


def test_an_index_outside_the_table_makes_nan():
    """And reads no memory beside the table; on the CPU it is an error."""
    arguments = raw_arguments(Case((3, 4), (2, 2)))
    for outside in (100, -1, 1 << 32):
        wrong = [x.clone() if isinstance(x, torch.Tensor) else x for x in arguments]
        wrong[9][0, 0] = outside
        with emulated_in_poisoned_memory():
            out = torch.ops.foveal.aggregated_attention(*wrong)[0]
        assert out[:, 0].isnan().all()
        assert out[:, 1:].isfinite().all()
