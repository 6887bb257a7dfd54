import pytest
import torch

from foveal import ops
from foveal.ops import reference
from tests.ops.helpers import DTYPES, assert_as_accurate, needs_compiler, on_devices, poisoned_memory, results

ACTS = tuple(reference.ACTIVATIONS)
# (B, H, W, C), grid: dividing, not dividing (bins overlap), one cell, larger than the map, no image
CASES = [((2, 8, 6, 24), (4, 3)), ((2, 7, 5, 9), (3, 2)), ((1, 5, 9, 17), (1, 1)), ((3, 4, 3, 40), (4, 3))]
CASES += [((2, 3, 2, 8), (7, 5)), ((1, 1, 1, 1), (1, 1)), ((1, 25, 42, 72), (12, 21)), ((0, 4, 4, 8), (2, 2))]
CASES += [((2, 1, 11, 33), (1, 4)), ((1, 10, 10, 700), (3, 7))]


def pool(grid, act="gelu"):
    return lambda x: ops.activate_and_pool(x, grid, act)


def tokens(shape, dtype=torch.float32):
    return (2 * torch.randn(shape)).to(dtype).requires_grad_()


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("grid", [(2, 3), (1, 1), (5, 4)])
def test_reference_has_right_gradients(act, grid):
    with ops.backend("reference"):
        assert torch.autograd.gradcheck(pool(grid, act), tokens((2, 4, 3, 2), torch.float64))


@on_devices
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "grid"), CASES, ids=str)
def test_compiled_is_as_accurate_as_the_reference(shape, grid, dtype):
    with poisoned_memory():
        assert_as_accurate(pool(grid), [tokens(shape, dtype)])


@on_devices
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ACTS)
def test_every_activation(act, dtype):
    assert_as_accurate(pool((2, 3), act), [tokens((2, 5, 6, 19), dtype)])


@on_devices
@pytest.mark.parametrize(
    "view", [lambda x: x[:, ::2, 1:, 3:23], lambda x: x.transpose(1, 2), lambda x: x[..., ::3], lambda x: x.flip(1)]
)
def test_strided_inputs(view):
    assert_as_accurate(lambda x: ops.activate_and_pool(view(x), (2, 3)), [tokens((2, 6, 7, 30))])


@on_devices
def test_expanded_gradient():
    x = tokens((2, 6, 7, 20))
    grads = []
    for name in ("compiled", "reference"):
        with ops.backend(name):
            grads.append(torch.autograd.grad(ops.activate_and_pool(x, (4, 3)).sum(), x)[0])
    torch.testing.assert_close(*grads)


@on_devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_opcheck(dtype):
    torch.library.opcheck(torch.ops.foveal.activate_and_pool, (tokens((2, 4, 5, 6), dtype), [2, 3], "gelu"))


@needs_compiler
def test_runs_repeat_bit_for_bit_over_thread_counts():
    x, threads = tokens((3, 20, 17, 70)), torch.get_num_threads()
    first, again = (results(pool((6, 5)), [x], "compiled") for _ in range(2))
    try:
        torch.set_num_threads(1)
        alone = results(pool((6, 5)), [x], "compiled")
    finally:
        torch.set_num_threads(threads)
    for a, b, c in zip(first, again, alone, strict=True):
        assert a.equal(b)
        assert a.equal(c)


@on_devices
def test_compiles_as_one_graph_for_all_sizes():
    torch._dynamo.reset()
    graphs = []

    def collect(graph, _):
        graphs.append(graph)
        return graph

    @torch.compile(fullgraph=True, dynamic=True, backend=collect)
    def halve(x):
        return ops.activate_and_pool(x, (x.shape[1] // 2, x.shape[2] // 2))

    for shape in [(2, 5, 6, 8), (3, 9, 4, 8), (2, 12, 13, 8)]:
        x = tokens(shape)
        torch.testing.assert_close(halve(x), ops.activate_and_pool(x, (shape[1] // 2, shape[2] // 2)))
    assert len(graphs) == 1
    assert "foveal.activate_and_pool" in graphs[0].code


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("shape", "grid"), CASES, ids=str)
def test_bias_of_the_input(shape, grid, dtype):
    x, input_bias = tokens(shape, dtype).detach(), torch.randn(shape[-1]).to(dtype)
    with poisoned_memory():
        assert_as_accurate(lambda *t: ops.activate_and_pool(t[0], grid, input_bias=t[1]), [x, input_bias])


@needs_compiler
def test_bias_of_the_input_has_a_gradient():
    x, input_bias = tokens((2, 6, 5, 20)), torch.randn(20, requires_grad=True)
    for tensor in (x, x.detach()):
        assert_as_accurate(lambda *t: ops.activate_and_pool(t[0], (2, 3), input_bias=t[1]), [tensor, input_bias])


@needs_compiler
def test_opcheck_of_the_inference_op():
    op = torch.ops.foveal.activate_and_pool_with_input_bias
    torch.library.opcheck(op, (tokens((2, 4, 5, 6)).detach(), torch.randn(6), [2, 3], "gelu"))


def test_bias_of_the_input_must_fit():
    with pytest.raises(ValueError, match=r"input_bias must have shape \(C,\) = \(6,\), got \(5,\)"):
        ops.activate_and_pool(torch.randn(2, 4, 5, 6), (2, 2), input_bias=torch.randn(5))
