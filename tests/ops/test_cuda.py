"""What matters on a GPU alone: streams, graphs, determinism, sizes. ``-m cuda`` selects the ops' tests on it too."""

import pytest
import torch

from foveal import ops
from tests.ops import test_attention as attention
from tests.ops import test_gate as gate
from tests.ops import test_pool as pool
from tests.ops import test_window as window
from tests.ops.helpers import results

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.fixture(autouse=True)
def _on_gpu():
    with torch.device("cuda"), ops.backend("compiled"):
        yield


def calls(scale=1):
    """By op: a function of tensors alone, and its tensors, of a size that ``scale`` multiplies."""
    q, k, weights, v = window.operands((2, 6 * scale, 10, 3, 24, 3), torch.bfloat16)
    return {
        "depthwise_gate": (gate.gate(), gate.inputs((2, 9 * scale, 14, 72, 3), torch.bfloat16, torch.float32)),
        "activate_and_pool": (pool.pool((4, 5)), [pool.tokens((2, 9 * scale, 14, 72), torch.bfloat16)]),
        "window_scores": (window.finite_scores(3), [q, k]),
        "window_sum": (window.weighted(3), [weights, v]),
        "aggregated_attention": attention.make(
            attention.Case((8 * scale, 14), (4, 7), heads=3), torch.bfloat16, torch.float32
        ),
    }


OPS = ("depthwise_gate", "activate_and_pool", "window_scores", "window_sum", "aggregated_attention")


def forward_and_backward(function, inputs):
    return results(function, inputs, "compiled")


@pytest.mark.parametrize("name", OPS)
def test_runs_repeat_bit_for_bit_where_determinism_is_asked_for(name):
    function, inputs = calls()[name]
    torch.use_deterministic_algorithms(True)
    try:
        runs = [forward_and_backward(function, inputs) for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(a.equal(b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("name", OPS)
def test_two_shapes_in_turn(name):
    first, second = calls()[name], calls(scale=3)[name]
    expected = [forward_and_backward(*call) for call in (first, second)]
    for _ in range(3):
        for call, values in zip((first, second), expected, strict=True):
            torch.testing.assert_close(forward_and_backward(*call), values)


@pytest.mark.parametrize("name", OPS)
def test_runs_on_the_current_stream(name):
    """The inputs are written late on a stream of its own: whoever reads them on another finds the old ones."""
    function, inputs = calls()[name]
    inputs = [None if x is None else x.detach() for x in inputs]
    expected = function(*inputs)
    late = [None if x is None else torch.zeros_like(x) for x in inputs]
    function(*late)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    outs = []
    for stream in streams:
        with torch.cuda.stream(stream):
            mine = [None if x is None else torch.zeros_like(x) for x in inputs]
            torch.cuda._sleep(50_000_000)
            for x, value in zip(mine, inputs, strict=True):
                if x is not None:
                    x.copy_(value)
            outs.append(function(*mine))
    torch.cuda.synchronize()
    for out in outs:
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("name", OPS)
def test_captured_in_a_graph(name):
    function, inputs = calls()[name]
    fresh = [None if x is None else torch.randn_like(x) for x in inputs]
    wanted = [x for x in inputs if x is not None and x.requires_grad]
    upstream = torch.randn_like(function(*inputs))

    def step():
        out = function(*inputs)
        return out.detach(), *torch.autograd.grad(out, wanted, upstream)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for x, value in zip(inputs, fresh, strict=True):
            if x is not None:
                x.copy_(value)
    graph.replay()
    torch.testing.assert_close(captured, step())


@pytest.mark.parametrize("name", OPS)
def test_compiles_with_graphs(name):
    torch._dynamo.reset()
    function, inputs = calls()[name]
    compiled = torch.compile(function, fullgraph=True, mode="reduce-overhead")
    for _ in range(3):
        ours = [x.clone() for x in forward_and_backward(compiled, inputs)]
    torch.testing.assert_close(ours, forward_and_backward(function, inputs))


@pytest.mark.parametrize("name", OPS)
def test_another_device_than_the_current(name):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    function, inputs = calls()[name]
    if name == "aggregated_attention":
        pytest.skip("its position bias is made on the current device")
    there = [None if x is None else x.detach().to("cuda:1").requires_grad_(x.requires_grad) for x in inputs]
    for ours, expected in zip(
        forward_and_backward(function, there), forward_and_backward(function, inputs), strict=True
    ):
        torch.testing.assert_close(ours.to("cuda:0"), expected)


def needs_memory(gigabytes):
    if torch.cuda.mem_get_info()[0] < gigabytes * 1e9:
        pytest.skip(f"needs {gigabytes} GB of free GPU memory")


# (B, H, W, C): more than 2^31 elements, and more rows and images than a grid has blocks on its second side
@pytest.mark.parametrize("shape", [(33, 512, 512, 136), (70_000, 3, 1, 8), (1, 70_000, 3, 8)], ids=str)
def test_large_maps(shape):
    batch, height, width, channels = shape
    needs_memory(24 if batch == 33 else 1)
    x = torch.empty(batch, height, width, 2 * channels, dtype=torch.bfloat16).normal_()
    weight = torch.randn(channels, 1, 3, 3, dtype=torch.bfloat16)
    whole = ops.depthwise_gate(x, weight)
    assert whole[-1:].equal(ops.depthwise_gate(x[-1:].clone(), weight))
    del whole
    torch.testing.assert_close(*(_gate_gradient(part, weight)[-1] for part in (x, x[-1:].clone())))
    if height <= 65_535:
        assert ops.activate_and_pool(x, (2, 1))[-1:].equal(ops.activate_and_pool(x[-1:].clone(), (2, 1)))
    q, k = (half.unflatten(-1, (-1, 8)) for half in x.chunk(2, dim=-1))
    scores = ops.window_scores(q, k, 3)
    assert scores[-1:].equal(ops.window_scores(q[-1:].clone(), k[-1:].clone(), 3))


# (B, H, W, channels of q, k and v): more than 2^31 elements, more images than a grid's second side, a long side
@pytest.mark.parametrize("shape", [(31, 512, 512, 288), (70_000, 3, 1, 24), (1, 70_000, 3, 24)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_over_large_maps(shape, dtype):
    batch = shape[0]
    needs_memory((60 if dtype == torch.float32 else 30) if batch == 31 else 2)
    qkv = torch.empty(*shape, dtype=dtype).normal_().requires_grad_()
    kv = torch.randn(batch, 2, 2, 2 * shape[-1] // 3, dtype=dtype, requires_grad=True)
    upstream = torch.empty(*shape[:-1], shape[-1] // 3, dtype=dtype).normal_()

    def run(first):
        """Output and gradients of the images from ``first`` on; q, k, v are strided views of one map."""
        maps = (qkv[first:].unflatten(-1, (3, -1, 8)).unbind(3), kv[first:].unflatten(-1, (2, -1, 8)).unbind(3))
        scale = torch.ones(shape[-1] // 24)
        out = ops.aggregated_attention(
            *maps[0], *maps[1], window_size=3, scale=scale, length_scaled=True, normalize=True
        )
        return out[-1:], *(x[-1:] for x in torch.autograd.grad(out.flatten(3), (qkv, kv), upstream[first:]))

    # A pooled key's gradient sums up to 2^18 queries, in parts that depend on the batch; a wrong address is far off.
    for whole, last in zip(run(0), run(batch - 1), strict=True):
        assert (whole - last).abs().max() <= max(1e-3, 2 * torch.finfo(dtype).eps) * last.abs().max()


def _gate_gradient(x, weight):
    return torch.ops.foveal.depthwise_gate_backward(x[..., : x.shape[-1] // 2], x, weight, None, "gelu", 1)[0]


def test_a_side_too_long_for_the_pool_is_refused():
    with pytest.raises(RuntimeError, match="a side of more than 65535 cells"):
        ops.activate_and_pool(torch.zeros(1, 65_536, 1, 8), (1, 1))
