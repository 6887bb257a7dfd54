import os
import subprocess
import sys

import pytest
import torch

from foveal import ops
from foveal.ops import reference
from tests.ops.helpers import DTYPES, assert_as_accurate, needs_compiler, on_devices, poisoned_memory, results

ACTS = tuple(reference.ACTIVATIONS)
# B, H, W, C, k: maps smaller than the window, one row or column, channels short of a vector and past it, no image, two
# blocks of channels
SHAPES = [(2, 5, 3, 7, 3), (1, 1, 1, 1, 3), (2, 9, 1, 24, 3), (1, 1, 13, 40, 5), (3, 2, 2, 17, 7), (2, 8, 6, 72, 3)]
SHAPES += [
    (1, 14, 11, 33, 5),
    (2, 4, 5, 16, 1),
    (0, 4, 4, 8, 3),
    (1, 60, 34, 9, 3),
    (1, 7, 9, 700, 3),
    (1, 6, 70, 130, 7),
    (1, 4, 300, 130, 3),
    (1, 3, 2, 5, 65),
]


def inputs(shape, dtype=torch.float32, parameter_dtype=None, bias=True):
    batch, height, width, channels, size = shape
    x = torch.randn(batch, height, width, 2 * channels).to(dtype)
    parameters = [torch.randn(channels, 1, size, size) / size, torch.randn(channels) if bias else None]
    parameters = [None if p is None else p.to(parameter_dtype or dtype) for p in parameters]
    return [None if t is None else t.requires_grad_() for t in (x, *parameters)]


def gate(act="gelu"):
    return lambda x, weight, bias: ops.depthwise_gate(x, weight, bias, act)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("size", [1, 3, 5])
def test_reference_has_right_gradients(act, size):
    with ops.backend("reference"):
        assert torch.autograd.gradcheck(gate(act), inputs((2, 3, 4, 2, size), torch.float64))


@on_devices
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_compiled_is_as_accurate_as_the_reference(shape, dtype):
    with poisoned_memory():
        assert_as_accurate(gate(), inputs(shape, dtype))


@on_devices
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ACTS)
def test_every_activation(act, dtype):
    x, weight, bias = inputs((2, 6, 5, 21, 3), dtype)
    assert_as_accurate(gate(act), [(4 * x).detach().requires_grad_(), weight, bias])


@on_devices
@pytest.mark.parametrize("act", ACTS)
def test_infinities_and_nan_pass_through_the_activation(act):
    gates = torch.tensor([float("inf"), -float("inf"), float("nan"), -100.0, 100.0, -5.7, 5.7, 0.0, -0.0])
    x = torch.cat([gates, torch.ones(9)]).view(1, 1, 1, 18)
    compiled, plain = (results(gate(act), [x, torch.ones(9, 1, 1, 1), None], b)[0] for b in ("compiled", "reference"))
    assert compiled.flatten()[0] == float("inf")  # of which PyTorch's vectorised gelu makes NaN
    torch.testing.assert_close(compiled[..., 1:], plain[..., 1:], rtol=1e-6, atol=3e-7, equal_nan=True)


@on_devices
@pytest.mark.parametrize("parameter_dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_parameters_of_another_dtype(dtype, parameter_dtype):
    assert_as_accurate(gate(), inputs((2, 5, 6, 20, 3), dtype, parameter_dtype))


@on_devices
@pytest.mark.parametrize("wanted", range(8))
def test_every_subset_of_gradients(wanted):
    tensors = [t.detach().requires_grad_(bool(wanted >> i & 1)) for i, t in enumerate(inputs((2, 6, 5, 20, 3)))]
    with poisoned_memory():
        assert_as_accurate(gate(), tensors)


@on_devices
def test_without_bias():
    assert_as_accurate(gate(), inputs((2, 6, 5, 20, 3), bias=False))


@on_devices
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, ::2, 1:, 3:43],
        lambda x: x.transpose(1, 2)[..., :40],
        lambda x: x.flip(0)[..., 5:45],
        lambda x: x[..., ::2][..., :40],
        lambda x: x[:1, :, :, :40].expand(3, -1, -1, -1),
    ],
)
def test_strided_inputs(view):
    x, weight, bias = inputs((2, 6, 7, 50, 3))
    weight, bias = (p[:20].detach().requires_grad_() for p in (weight, bias))
    assert_as_accurate(lambda *t: ops.depthwise_gate(view(t[0]), *t[1:]), [x, weight, bias])


@on_devices
def test_expanded_gradient():
    tensors = inputs((2, 6, 5, 20, 3))
    grads = []
    for name in ("compiled", "reference"):
        with ops.backend(name):
            grads.append(torch.autograd.grad(ops.depthwise_gate(*tensors).sum(), tensors))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


@on_devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_opcheck(dtype):
    torch.library.opcheck(torch.ops.foveal.depthwise_gate, (*inputs((2, 4, 5, 6, 3), dtype, torch.float32), "gelu"))


@needs_compiler
def test_runs_repeat_bit_for_bit_and_agree_over_thread_counts():
    tensors, threads = inputs((3, 20, 17, 70, 3)), torch.get_num_threads()
    first, again = (results(gate(), tensors, "compiled") for _ in range(2))
    try:
        torch.set_num_threads(1)
        alone = results(gate(), tensors, "compiled")
    finally:
        torch.set_num_threads(threads)
    for a, b, c in zip(first, again, alone, strict=True):
        assert a.equal(b)
        torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-5)


@on_devices
def test_compiles_as_one_graph_for_all_sizes_and_follows_the_backend():
    torch._dynamo.reset()
    graphs = []

    def collect(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(gate(), fullgraph=True, dynamic=True, backend=collect)
    for shape in [(2, 5, 6, 8, 3), (3, 9, 4, 8, 3), (4, 12, 13, 8, 3)]:
        tensors = inputs(shape)
        torch.testing.assert_close(compiled(*tensors), ops.depthwise_gate(*tensors))
    assert len(graphs) == 1
    assert "foveal.depthwise_gate" in graphs[0].code
    with ops.backend("reference"):
        compiled(*tensors)
    assert len(graphs) == 2
    assert "foveal.depthwise_gate" not in graphs[1].code


@needs_compiler
def test_working_memory_is_written_before_it_is_read():
    """The C library fills what it hands out with garbage: the kernels' own scratch, not only tensors."""
    code = (
        "import torch; from tests.ops.test_gate import *\n"
        "for shape in SHAPES: assert_as_accurate(gate(), inputs(shape))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "MALLOC_PERTURB_": "85"})


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bias_of_the_input(shape, dtype):
    x, weight, bias = (t.detach() for t in inputs(shape, dtype))
    input_bias = torch.randn(x.shape[-1], dtype=dtype)
    with poisoned_memory():
        assert_as_accurate(lambda *t: ops.depthwise_gate(*t[:3], input_bias=t[3]), [x, weight, bias, input_bias])


@needs_compiler
def test_bias_of_the_input_has_a_gradient():
    x, weight, bias = inputs((2, 6, 5, 20, 3))
    input_bias = torch.randn(40, requires_grad=True)
    assert_as_accurate(lambda *t: ops.depthwise_gate(*t[:3], input_bias=t[3]), [x, weight, bias, input_bias])
    x, weight, bias = (t.detach() for t in (x, weight, bias))
    assert_as_accurate(lambda *t: ops.depthwise_gate(*t[:3], input_bias=t[3]), [x, weight, bias, input_bias])


@needs_compiler
def test_opcheck_of_the_inference_op():
    x, weight, bias = (t.detach() for t in inputs((2, 4, 5, 6, 3)))
    op = torch.ops.foveal.depthwise_gate_with_input_bias
    torch.library.opcheck(op, (x, torch.randn(12), weight, bias, "gelu"))


def test_bias_of_the_input_must_fit():
    x, weight, bias = inputs((2, 4, 5, 6, 3))
    with pytest.raises(ValueError, match=r"input_bias must have shape \(2C,\) = \(12,\), got \(6,\)"):
        ops.depthwise_gate(x, weight, bias, input_bias=torch.randn(6))
