from functools import partial

import pytest
import torch
import torch.nn.functional as F

from foveal import ops
from tests.ops.helpers import CAP, DTYPES, SLACK, needs_compiler, poisoned_memory

# Rows shorter than a vector, of one, ending within one; fewer rows than are normalised together, and none.
SHAPES = [(2, 3, 5, 72), (3, 1), (5, 7), (4, 16), (9, 33), (1, 1, 64), (130, 576), (0, 8), (2, 0, 24)]
SERVED = [dtype for dtype in DTYPES if dtype != torch.float16]


def operands(shape, dtype, parameters=True):
    x, y = (3 * torch.randn(shape) + 5).to(dtype), torch.randn(shape).to(dtype)
    weight, bias = (torch.randn(shape[-1]).to(dtype) if parameters else None for _ in range(2))
    return x, y, weight, bias


def plain(x, y, weight, bias, eps=1e-5, y_bias=None):
    if y is None:
        total = x
    elif y_bias is None:
        total = x + y
    else:
        exact = torch.promote_types(x.dtype, torch.float32)
        total = (x.to(exact) + (y.to(exact) + y_bias.to(exact))).to(torch.promote_types(x.dtype, y.dtype))
    return total, F.layer_norm(total, total.shape[-1:], weight, bias, eps)


def assert_accurate(x, y, weight, bias, eps=1e-5, y_bias=None):
    with torch.no_grad(), ops.backend("compiled"), poisoned_memory():
        total, norm = ops.add_layer_norm(x, y, weight, bias, eps, y_bias=y_bias)
        stream = x.clone(memory_format=torch.preserve_format)
        same_total, same_norm = ops.add_layer_norm(stream, y, weight, bias, eps, y_bias=y_bias, inplace=True)
    assert same_total.equal(total)
    assert (same_total is stream) == (y is None or stream.is_contiguous())
    assert same_norm.equal(norm)
    expected_total, theirs = plain(x, y, weight, bias, eps, y_bias)
    assert total.equal(expected_total)
    assert norm.dtype == x.dtype
    # The norm of the sum as it was stored.
    exact = plain(*(None if t is None else t.double() for t in (expected_total, None, weight, bias)), eps)[1]
    if exact.numel() == 0:
        assert norm.shape == exact.shape
        return
    scale = exact.abs().max().clamp(min=1)
    error, bound = ((t.double() - exact).abs().max() for t in (norm, theirs))
    assert error <= 2 * bound + SLACK[x.dtype] * scale
    assert error <= CAP[x.dtype] * scale


@needs_compiler
@pytest.mark.parametrize("dtype", SERVED)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_compiled_is_as_accurate_as_pytorch(shape, dtype):
    x, y, weight, bias = operands(shape, dtype)
    assert_accurate(x, y, weight, bias)
    assert_accurate(x, y, weight, bias, y_bias=torch.randn(shape[-1]).to(dtype))
    assert_accurate(x, None, weight, bias)


@needs_compiler
@pytest.mark.parametrize("missing", [(0,), (1,), (0, 1)])
def test_parameters_are_optional(missing):
    x, y, *parameters = operands((3, 40), torch.float32)
    assert_accurate(x, y, *(None if i in missing else p for i, p in enumerate(parameters)))


@needs_compiler
def test_a_large_mean_costs_no_digits():
    x, y, weight, bias = operands((6, 100), torch.float32)
    assert_accurate(x + 1e4, y, weight, bias)
    assert_accurate(torch.full_like(x, 7.0), None, weight, bias, eps=1e-6)


@needs_compiler
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("channel", [0, 71])
def test_nan_and_infinity_stay_in_their_row(value, channel):
    x, y, weight, bias = operands((9, 72), torch.bfloat16)
    clean = x.clone()
    x[4, channel] = value
    with torch.no_grad(), ops.backend("compiled"):
        (_, norm), (_, expected) = (ops.add_layer_norm(t, y, weight, bias) for t in (x, clean))
    assert norm[4].isnan().all()
    others = torch.arange(9) != 4
    assert norm[others].equal(expected[others])


@needs_compiler
@pytest.mark.parametrize("view", [lambda x: x[:, ::2], lambda x: x.transpose(0, 1), lambda x: x.flip(-1)])
def test_strided_inputs(view):
    x, y, weight, bias = operands((4, 6, 24), torch.float32)
    assert_accurate(view(x), view(y), weight, bias)


def test_without_a_branch_the_stream_is_returned_itself():
    x, _, weight, bias = operands((2, 3, 24), torch.float32)
    for name in ("auto", "reference"):
        with torch.no_grad(), ops.backend(name):
            assert ops.add_layer_norm(x, None, weight, bias)[0] is x


def test_has_the_gradients_of_pytorch():
    inputs = [t.requires_grad_() for t in (*operands((3, 5), torch.float64), torch.randn(5).double())]

    def function(*inputs, inplace=False):
        *inputs, y_bias = inputs
        stream = inputs[0].clone() if inplace else inputs[0]
        return ops.add_layer_norm(stream, *inputs[1:], y_bias=y_bias, inplace=inplace)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradcheck(partial(function, inplace=True), inputs)


@pytest.mark.parametrize("name", ["auto", "reference"])
def test_in_place_in_any_layout_and_backend(name):
    x, y, weight, bias = operands((4, 6, 24), torch.float32)
    y_bias = torch.randn(24)
    expected = plain(x, y, weight, bias, y_bias=y_bias)
    with torch.no_grad(), ops.backend(name):
        for stream in (x.clone(), x.transpose(0, 1).contiguous().transpose(0, 1)):
            ours = ops.add_layer_norm(stream, y, weight, bias, y_bias=y_bias, inplace=True)
            torch.testing.assert_close(ours, expected)
        alone = x.clone()
        assert ops.add_layer_norm(alone, None, weight, bias, inplace=True)[0] is alone
        assert alone.equal(x)


@needs_compiler
def test_a_backward_pass_notices_that_its_input_was_overwritten():
    x, y, weight, bias = operands((4, 24), torch.float32)
    product = (x * torch.ones(24, requires_grad=True)).sum()
    with torch.no_grad():
        ops.add_layer_norm(x, y, weight, bias, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@needs_compiler
def test_only_dense_memory_is_overwritten():
    x, y, weight, bias = operands((4, 6, 24), torch.float32)
    with pytest.raises(RuntimeError, match="must be contiguous"):
        torch.ops.foveal.add_layer_norm_(x.transpose(0, 1), y.transpose(0, 1), None, weight, bias, 1e-5)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_mixed_dtypes_are_pytorchs(dtypes):
    x, y, weight, bias = operands((3, 24), torch.float32)
    x, y = x.to(dtypes[0]), y.to(dtypes[1])
    with torch.no_grad():
        for y_bias in (None, torch.randn(24)):
            ours, theirs = (f(x, y, weight, bias, y_bias=y_bias) for f in (ops.add_layer_norm, plain))
            assert [t.dtype for t in ours] == [t.dtype for t in theirs]
            torch.testing.assert_close(ours, theirs)


def test_autocast_is_pytorchs():
    x, y, weight, bias = operands((3, 24), torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ours, theirs = ops.add_layer_norm(x, y, weight, bias), plain(x, y, weight, bias)
    assert [t.dtype for t in ours] == [t.dtype for t in theirs]


@needs_compiler
def test_registration():
    x, y, weight, bias = operands((2, 3, 24), torch.float32)
    for args in ((x, y, bias, weight, bias, 1e-5), (x, None, None, None, bias, 1e-6)):
        torch.library.opcheck(torch.ops.foveal.add_layer_norm.default, args)
    torch.library.opcheck(torch.ops.foveal.add_layer_norm_.default, (x, y, bias, weight, None, 1e-5))


@pytest.mark.parametrize("inplace", [False, True])
def test_compiles_as_one_graph(inplace):
    torch._dynamo.reset()
    x, y, weight, bias = operands((2, 3, 24), torch.float32)
    y_bias = torch.randn(24)
    add = partial(ops.add_layer_norm, y_bias=y_bias, inplace=inplace)
    compiled = torch.compile(add, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        ours = compiled(x.clone(), y, weight, bias)
    torch.testing.assert_close(ours, plain(x, y, weight, bias, y_bias=y_bias))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(2, 8, dtype=torch.int64), None), "x must be floating point"),
        ((torch.ones(2, 8), torch.ones(8)), "y must have shape that of x = (2, 8), got (8,)"),
        ((torch.ones(2, 8), None, torch.ones(4)), "weight must have shape (C,) = (8,), got (4,)"),
        ((torch.ones(2, 8), None, None, None, 1e-5, torch.ones(8)), "y_bias must be None where y is None"),
        ((torch.ones(2, 8), torch.ones(2, 8), None, None, 1e-5, torch.ones(4)), "y_bias must have shape (C,) = (8,)"),
        ((torch.ones(2, 8), None, None, torch.ones(2, 8)), "bias must have shape (C,) = (8,), got (2, 8)"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises((TypeError, ValueError)) as error:
        ops.add_layer_norm(*arguments[:5], y_bias=arguments[5] if len(arguments) > 5 else None)
    assert message in str(error.value)
