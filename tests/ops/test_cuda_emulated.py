"""The CUDA kernels on the host: tiling, reductions and indices. A GPU runs the ops' own tests instead."""

from contextlib import contextmanager

import pytest
import torch

from foveal import ops
from tests.ops import test_gate as gate
from tests.ops import test_pool as pool
from tests.ops import test_window as window
from tests.ops.cuda_emulator import emulated, needs_emulator
from tests.ops.helpers import assert_as_accurate, poisoned_memory

pytestmark = needs_emulator
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@contextmanager
def emulated_in_poisoned_memory():
    with poisoned_memory(), emulated() as ran:
        yield ran


def assert_emulated_is_accurate(function, inputs, kernels):
    assert assert_as_accurate(function, inputs, emulated_in_poisoned_memory) == kernels


POOL = {"activate_and_pool", "activate_and_pool_backward"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "grid"), [*pool.CASES, ((2, 3, 4, 0), (2, 2)), ((0, 3, 4, 8), (2, 2))], ids=str)
def test_pool(shape, grid, dtype):
    assert_emulated_is_accurate(pool.pool(grid), [pool.tokens(shape, dtype)], POOL)


@pytest.mark.parametrize("act", pool.ACTS)
def test_pool_activations(act):
    assert_emulated_is_accurate(pool.pool((2, 3), act), [pool.tokens((2, 5, 6, 20), torch.float16)], POOL)


@pytest.mark.parametrize("view", [lambda x: x[:, ::2, 1:, 3:23], lambda x: x.transpose(1, 2), lambda x: x[..., ::3]])
def test_pool_strided(view):
    x = pool.tokens((2, 6, 7, 30))
    assert_emulated_is_accurate(lambda x: ops.activate_and_pool(view(x), (2, 3)), [x], POOL)


GATE = {"depthwise_gate", "depthwise_gate_backward"}
# Strips of two columns that the map's width ends, of rows that it ends, of 64 channels and of fewer; cell by cell.
GATES = [*gate.SHAPES[:2], gate.SHAPES[3], (2, 9, 5, 8, 3), (1, 37, 6, 68, 3), (3, 4, 1, 132, 3), (2, 5, 4, 12, 5)]
GATES += [(0, 4, 4, 8, 3), (0, 4, 4, 7, 5), (2, 0, 4, 8, 3), (2, 4, 0, 7, 5), (2, 4, 4, 0, 3)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", GATES, ids=str)
def test_gate(shape, dtype):
    assert_emulated_is_accurate(gate.gate(), gate.inputs(shape, dtype), GATE)


@pytest.mark.parametrize("channels", [20, 21])
@pytest.mark.parametrize("act", gate.ACTS)
def test_gate_activations(act, channels):
    x, weight, bias = gate.inputs((2, 6, 5, channels, 3), torch.float16)
    assert_emulated_is_accurate(gate.gate(act), [(4 * x).detach().requires_grad_(), weight, bias], GATE)


@pytest.mark.parametrize("act", gate.ACTS)
def test_infinities_and_nan_pass_through_the_activation(act):
    with emulated() as ran:
        gate.test_infinities_and_nan_pass_through_the_activation(act)
    assert ran == {"depthwise_gate"}


@pytest.mark.parametrize("channels", [20, 21])
@pytest.mark.parametrize("wanted", range(8))
def test_gate_subsets_of_gradients(wanted, channels):
    inputs = gate.inputs((2, 6, 5, channels, 3), bias=wanted != 3)
    inputs = [None if t is None else t.detach().requires_grad_(bool(wanted >> i & 1)) for i, t in enumerate(inputs)]
    assert_emulated_is_accurate(gate.gate(), inputs, GATE if wanted else GATE - {"depthwise_gate_backward"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gate_parameters_of_another_dtype(dtype):
    parameter_dtype = torch.float64 if dtype == torch.float32 else torch.float32
    assert_emulated_is_accurate(gate.gate(), gate.inputs((2, 5, 6, 20, 3), dtype, parameter_dtype), GATE)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, ::2, 1:, 4:44],  # by strips
        lambda x: x[:, ::2, 1:, 3:43],
        lambda x: x.transpose(1, 2)[..., :40],
        lambda x: x[..., ::2][..., :40],
        lambda x: x[:1, :, :, :40].expand(3, -1, -1, -1),
    ],
)
def test_gate_strided(view):
    x, weight, bias = gate.inputs((2, 6, 7, 56, 3))
    weight, bias = (p[1:21].detach().requires_grad_() for p in (weight, bias))
    assert_emulated_is_accurate(lambda *t: ops.depthwise_gate(view(t[0]), *t[1:]), [x, weight, bias], GATE)


@pytest.mark.parametrize("channels", [8, 7])
def test_gate_by_chunks_of_images(channels):
    """Two of these images fill a chunk; the parameter gradients of all add up."""
    assert_emulated_is_accurate(gate.gate(), gate.inputs((5, 12, 10, channels, 3), torch.float32), GATE)


SCORES = {"window_scores", "window_scores_backward"}
SUM = {"window_sum", "window_sum_backward"}


def assert_windows_are_accurate(size, q, k, weights, v, view=lambda x: x):
    assert_emulated_is_accurate(lambda *x: window.finite_scores(size)(*map(view, x)), [q, k], SCORES)
    assert_emulated_is_accurate(lambda *x: window.weighted(size)(*map(view, x)), [weights, v], SUM)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*window.SHAPES, (2, 0, 4, 2, 8, 3), (2, 3, 0, 2, 8, 3), (2, 3, 4, 0, 8, 3)], ids=str)
def test_windows(shape, dtype):
    assert_windows_are_accurate(shape[-1], *window.operands(shape, dtype))


@pytest.mark.parametrize("view", [lambda x: x[:, ::2, 1:], lambda x: x.transpose(1, 2), lambda x: x.flip(-1)])
def test_windows_strided(view):
    assert_windows_are_accurate(3, *window.operands((2, 6, 8, 2, 12, 3)), view=view)


@pytest.mark.parametrize("wanted", [1, 2])
def test_windows_subsets_of_gradients(wanted):
    operands = window.operands((2, 5, 6, 2, 12, 3))
    assert_windows_are_accurate(
        3, *(x.detach().requires_grad_(bool(wanted >> i % 2 & 1)) for i, x in enumerate(operands))
    )
