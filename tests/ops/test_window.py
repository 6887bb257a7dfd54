import os
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from foveal import ops
from tests.ops.helpers import DTYPES, assert_as_accurate, needs_compiler, on_devices, poisoned_memory, results

# B, H, W, heads, d, k: cells, maps smaller than the window, tiles short of a vector and past it, no image
SHAPES = [(1, 1, 1, 1, 8, 3), (2, 3, 2, 2, 10, 5), (2, 7, 20, 3, 24, 3), (1, 9, 33, 2, 40, 1), (1, 5, 6, 2, 7, 7)]
SHAPES += [(1, 4, 17, 1, 16, 13), (2, 6, 5, 2, 200, 3), (0, 4, 4, 2, 8, 3)]


def operands(shape, dtype=torch.float32):
    *grid, dim, size = shape
    q, k, v = (torch.randn(*grid, dim).to(dtype).requires_grad_() for _ in range(3))
    return q, k, torch.randn(*grid, size * size).to(dtype).requires_grad_(), v


def finite_scores(size):
    """-inf outside the map has no error to measure."""
    return lambda q, k: ops.window_scores(q, k, size).clamp(min=-1e3)


def weighted(size):
    return lambda weights, v: ops.window_sum(weights, v, size)


@pytest.mark.parametrize("shape", [(1, 3, 2, 2, 2, 3), (2, 1, 3, 1, 3, 5), (1, 2, 2, 1, 2, 1)], ids=str)
def test_reference_has_right_gradients(shape):
    q, k, weights, v = operands(shape, torch.float64)
    with ops.backend("reference"):
        assert torch.autograd.gradcheck(finite_scores(shape[-1]), (q, k))
        assert torch.autograd.gradcheck(weighted(shape[-1]), (weights, v))


@on_devices
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_compiled_is_as_accurate_as_the_reference(shape, dtype):
    q, k, weights, v = operands(shape, dtype)
    with poisoned_memory():
        assert_as_accurate(finite_scores(shape[-1]), [q, k])
        assert_as_accurate(weighted(shape[-1]), [weights, v])


@on_devices
def test_minus_infinity_outside_the_map():
    q, k, *_ = operands((2, 4, 18, 2, 8, 5))
    compiled, plain = (
        results(lambda *x: ops.window_scores(*x, 5), [q, k], name)[0] for name in ("compiled", "reference")
    )
    assert compiled.isinf().equal(plain.isinf())


@on_devices
def test_a_softmax_over_the_window_differentiates():
    q, k, _, v = operands((2, 5, 6, 2, 12, 3))

    def attention(q, k, v):
        return ops.window_sum(ops.window_scores(q, k, 3).softmax(-1), v, 3)

    assert_as_accurate(attention, [q, k, v])


@on_devices
@pytest.mark.parametrize("wanted", range(4))
def test_every_subset_of_gradients(wanted):
    q, k, weights, v = operands((2, 5, 6, 2, 12, 3))
    for function, pair in ((finite_scores(3), (q, k)), (weighted(3), (weights, v))):
        with poisoned_memory():
            assert_as_accurate(function, [x.detach().requires_grad_(bool(wanted >> i & 1)) for i, x in enumerate(pair)])


@on_devices
@pytest.mark.parametrize("view", [lambda x: x[:, ::2, 1:], lambda x: x.transpose(1, 2), lambda x: x.flip(-1)])
def test_strided_inputs_and_gradients(view):
    q, k, weights, v = operands((2, 6, 8, 2, 12, 3))
    assert_as_accurate(lambda *x: finite_scores(3)(*map(view, x)).transpose(1, 3), [q, k])
    assert_as_accurate(lambda *x: weighted(3)(*map(view, x)).transpose(1, 3), [weights, v])


@on_devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_opcheck(dtype):
    q, k, weights, v = operands((2, 3, 4, 2, 6, 3), dtype)
    torch.library.opcheck(torch.ops.foveal.window_scores, (q, k, 3))
    torch.library.opcheck(torch.ops.foveal.window_sum, (weights, v, 3))


@on_devices
def test_runs_repeat_bit_for_bit():
    q, k, weights, v = operands((3, 9, 20, 3, 24, 3))
    for function, pair in ((finite_scores(3), (q, k)), (weighted(3), (weights, v))):
        first, again = (results(function, pair, "compiled") for _ in range(2))
        assert all(a.equal(b) for a, b in zip(first, again, strict=True))


@on_devices
def test_compiles_as_one_graph_for_all_sizes():
    torch._dynamo.reset()
    graphs = []

    def collect(graph, _):
        graphs.append(graph)
        return graph

    def attention(q, k, v):
        return ops.window_sum(ops.window_scores(q, k, 3).softmax(-1), v, 3)

    compiled = torch.compile(attention, fullgraph=True, dynamic=True, backend=collect)
    for shape in [(4, 5, 6, 2, 8, 3), (3, 9, 4, 2, 8, 3), (6, 12, 13, 2, 8, 3)]:
        q, k, _, v = operands(shape)
        torch.testing.assert_close(compiled(q, k, v), attention(q, k, v))
    assert len(graphs) == 1
    assert "foveal.window_scores" in graphs[0].code


def test_flops_are_those_of_the_reference():
    q, k, weights, v = operands((2, 6, 7, 2, 12, 3))
    for function, pair in ((finite_scores(3), (q, k)), (weighted(3), (weights, v))):
        counts = []
        for name in ("compiled", "reference"):
            with ops.backend(name), FlopCounterMode(display=False) as forward:
                out = function(*pair)
            with FlopCounterMode(display=False) as backward:
                out.sum().backward()
            counts.append((forward.get_total_flops(), backward.get_total_flops()))
        assert counts[0] == counts[1]


@needs_compiler
@pytest.mark.parametrize("instructions", ["baseline", "avx2"])
def test_working_memory_is_written_before_it_is_read_with_any_instructions(instructions):
    code = (
        "from tests.ops.test_window import *\n"
        "torch.manual_seed(0)\n"
        "for shape in SHAPES:\n"
        "    q, k, weights, v = operands(shape)\n"
        "    assert_as_accurate(finite_scores(shape[-1]), [q, k])\n"
        "    assert_as_accurate(weighted(shape[-1]), [weights, v])\n"
    )
    environment = {**os.environ, "MALLOC_PERTURB_": "85", "FOVEAL_CPU_ISA": instructions}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
