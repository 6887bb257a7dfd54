"""Second derivatives, forward derivatives, and vectors without a direction, of every op that is differentiated."""

from functools import partial

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from foveal import ops
from foveal.ops import PositionBias, backend, reference

ATTENTION = {"window_size": 3, "length_scaled": True, "normalize": True}


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def attention(q, k, v, k_pool, v_pool, scale, embedding, window_bias, table, tokens, bias):
    index = torch.arange(6).view(3, 2) % 4, torch.arange(8).view(4, 2) % 5
    return ops.aggregated_attention(
        *(q, k, v, k_pool, v_pool),
        **ATTENTION,
        scale=scale,
        query_embedding=embedding,
        window_bias=window_bias,
        pool_bias=PositionBias(table, *index),
        positional_tokens=tokens,
        positional_bias=bias,
    )


def attention_inputs():
    maps = [draw(1, 3, 4, 2, 4) for _ in range(3)] + [draw(1, 2, 2, 2, 4) for _ in range(2)]
    return [*maps, draw(2), draw(2, 4), draw(2, 9), draw(2, 4, 5), draw(2, 4, 9), draw(2, 9)]


def finite_scores(q, k):
    scores = ops.window_scores(q, k, 3)
    return scores.masked_fill(scores.isinf(), 0)


ROWS = torch.linspace(-1, 1, 5, dtype=torch.float64)
OPS = {
    "aggregated_attention": (attention, attention_inputs),
    "depthwise_gate": (ops.depthwise_gate, lambda: [draw(1, 3, 4, 8), draw(4, 1, 3, 3), draw(4)]),
    "depthwise_gate without bias": (
        partial(ops.depthwise_gate, act="silu"),
        lambda: [draw(1, 3, 4, 8), draw(4, 1, 3, 3)],
    ),
    "depthwise_gate with input_bias": (
        lambda x, w, b, i: ops.depthwise_gate(x, w, b, input_bias=i),
        lambda: [draw(1, 3, 4, 8), draw(4, 1, 3, 3), draw(4), draw(8)],
    ),
    "activate_and_pool": (partial(ops.activate_and_pool, grid=(2, 3)), lambda: [draw(2, 3, 4, 5)]),
    "window_scores": (finite_scores, lambda: [draw(1, 3, 4, 2, 4) for _ in range(2)]),
    "window_sum": (
        lambda weights, v: ops.window_sum(weights, v, 3),
        lambda: [draw(1, 3, 4, 2, 9), draw(1, 3, 4, 2, 4)],
    ),
    "log_cpb_table": (
        lambda *parameters: ops.log_cpb_table(ROWS, ROWS, *parameters),
        lambda: [draw(8, 2), draw(8), draw(2, 8), draw(2)],
    ),
    "add_layer_norm": (
        lambda *inputs: torch.stack(ops.add_layer_norm(*inputs)),
        lambda: [draw(2, 3, 5), draw(2, 3, 5), draw(5), draw(5)],
    ),
    "conv_glu": (
        ops.conv_glu,
        lambda: [draw(1, 3, 4, 3), draw(8, 3), draw(8), draw(4, 1, 3, 3), draw(4), draw(2, 4), draw(2)],
    ),
}


@pytest.fixture(params=["auto", "reference"], autouse=True)
def _backend(request):
    with backend(request.param):
        yield


@pytest.fixture(params=OPS.values(), ids=OPS)
def op(request):
    function, inputs = request.param
    return function, inputs()


def test_second_derivatives(op):
    function, inputs = op
    assert gradgradcheck(function, inputs, atol=1e-5)


def test_a_gradient_penalty_is_that_of_the_definition(op):
    function, inputs = op

    def penalty():
        out = function(*inputs)
        grads = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), inputs)

    ours = penalty()
    with backend("reference"):
        for mine, theirs in zip(ours, penalty(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-8)


def test_one_tensor_as_two_inputs():
    x, v = draw(1, 3, 4, 2, 4), draw(1, 3, 4, 2, 4)
    assert gradgradcheck(lambda x: finite_scores(x, x), [x])
    assert gradcheck(lambda x: finite_scores(x, x + v), [x])


@pytest.mark.parametrize("grad", [True, False])
def test_forward_derivatives_are_those_of_the_definition(op, grad):
    function, inputs = op
    inputs = [x.detach() for x in inputs]
    tangents = [torch.randn_like(x) for x in inputs]
    with torch.autograd.forward_ad.dual_level(), torch.set_grad_enabled(grad):
        duals = map(torch.autograd.forward_ad.make_dual, inputs, tangents)
        _, tangent = torch.autograd.forward_ad.unpack_dual(function(*duals))
    step = 1e-6
    ahead, behind = (function(*(x + s * t for x, t in zip(inputs, tangents, strict=True))) for s in (step, -step))
    torch.testing.assert_close(tangent, (ahead - behind) / (2 * step), rtol=1e-4, atol=1e-6)


# Vectors without a direction: of a padded or black image at initialisation.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("length", [0.0, 1e-13, 1e-11])
def test_a_vector_shorter_than_1e_12_is_zero_and_passes_no_gradient(length, dtype):
    inputs = [x.detach().to(dtype) for x in attention_inputs()]
    for x in (inputs[0], inputs[1], inputs[3]):
        x[:, :1] = length * torch.nn.functional.normalize(x[:, :1].double(), dim=-1).to(dtype)
    zeroed = [x.clone() for x in inputs]
    for x in (zeroed[0], zeroed[1], zeroed[3]):
        x[:, :1] = 0
    leaves = [x.requires_grad_() for x in inputs]
    out = attention(*leaves)
    grads = torch.autograd.grad(out.float().square().sum(), leaves)
    assert all(g.isfinite().all() for g in grads)
    short = length < 1e-12
    assert torch.equal(out, attention(*zeroed)) == short
    for index in (0, 1, 3):
        assert grads[index][:, :1].any() != short
        assert grads[index][:, 1:].any()


def test_unit_vectors():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-13, 0.0], [2e-12, 0.0]], dtype=torch.float64)
    expected = torch.tensor([[0.6, 0.8], [0.0, 0.0], [0.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    assert torch.equal(reference.unit(x), expected)
    assert reference.unit(x.bfloat16()).dtype == torch.float32
    assert gradgradcheck(reference.unit, [draw(5, 3)])
