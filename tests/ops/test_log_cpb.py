import pytest
import timm
import torch
from torch._dynamo.utils import counters
from torch.library import opcheck

from foveal import ops
from foveal.blocks import AggregatedAttention
from foveal.ops import log_cpb, reference
from tests.ops.helpers import assert_as_accurate, needs_compiler, poisoned_memory, results

# rows, columns, hidden, heads: vectors that fill up and ones that do not, every group of heads
CASES = [(5, 7, 16, 1), (1, 1, 5, 2), (16, 17, 512, 3), (3, 40, 33, 7), (26, 2, 64, 12), (13, 13, 48, 24)]


def mlp(hidden, heads, dtype=torch.float32):
    shapes = [(hidden, 2), (hidden,), (heads, hidden), (heads,)]
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def table(rows, columns):
    def run(*parameters):
        dtype = torch.promote_types(parameters[0].dtype, torch.float32)
        axes = torch.linspace(-1, 1, rows), torch.linspace(-0.9, 1, columns)  # the same places for every type
        return ops.log_cpb_table(*(axis.to(dtype) for axis in axes), *parameters)

    return run


def test_reference_runs_the_mlp_on_every_pair():
    rows, columns = torch.randn(4), torch.randn(6)
    weight1, bias1, weight2, bias2 = mlp(8, 3)
    pairs = torch.cartesian_prod(rows, columns)
    expected = torch.relu(pairs @ weight1.T + bias1) @ weight2.T + bias2
    actual = reference.log_cpb_table(rows, columns, weight1, bias1, weight2, bias2)
    torch.testing.assert_close(actual, expected.T.view(3, 4, 6))


@pytest.mark.parametrize("name", ["reference", "auto"])
def test_gradients(name):
    with ops.backend(name):
        assert torch.autograd.gradcheck(table(4, 5), mlp(9, 3, torch.float64))


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns", "hidden", "heads"), CASES, ids=str)
def test_compiled_is_as_accurate_as_the_reference(rows, columns, hidden, heads, dtype):
    with poisoned_memory():
        assert_as_accurate(table(rows, columns), mlp(hidden, heads, dtype))


@needs_compiler
def test_only_wanted_gradients():
    parameters = mlp(20, 3)
    complete = results(table(4, 5), parameters, "compiled")
    for i, parameter in enumerate(parameters):
        alone = [p.detach().requires_grad_(p is parameter) for p in parameters]
        torch.testing.assert_close(results(table(4, 5), alone, "compiled")[1], complete[1 + i], rtol=0, atol=0)


@needs_compiler
def test_deterministic():
    parameters = mlp(512, 3)
    first, second = (results(table(50, 60), parameters, "compiled") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_default_implementation_works_in_chunks(monkeypatch):
    monkeypatch.setattr(log_cpb, "_HIDDEN_ELEMENTS", 6 * 16 * 2)  # two rows at a time
    rows, columns, parameters = torch.randn(7), torch.randn(6), mlp(16, 3)
    assert len(log_cpb._row_chunks(rows, columns, 16)) == 4
    whole = reference.log_cpb_table(rows, columns, *parameters)
    torch.testing.assert_close(log_cpb._default(rows, columns, *parameters), whole)
    upstream = torch.randn_like(whole)
    expected = torch.autograd.grad(whole, parameters, upstream)
    for ours, theirs in zip(log_cpb._backward(upstream, rows, columns, *parameters, 0b1111), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_opcheck():
    opcheck(torch.ops.foveal.log_cpb_table.default, (torch.randn(5), torch.randn(4), *mlp(8, 2)))
    opcheck(torch.ops.foveal.relative_offsets.default, (torch.randn(2), 7, 3))


def test_errors_name_the_argument():
    weight1, bias1, weight2, bias2 = mlp(8, 2)
    with pytest.raises(ValueError, match="weight1 must have shape"):
        ops.log_cpb_table(torch.randn(3), torch.randn(3), weight1.T, bias1, weight2, bias2)
    with pytest.raises(ValueError, match="rows must have shape"):
        ops.log_cpb_table(torch.randn(3, 1), torch.randn(3), weight1, bias1, weight2, bias2)


def graph_breaks(module, inputs):
    """How often ``torch.compile`` breaks off over these inputs, the second of which makes sizes dynamic."""
    torch._dynamo.reset()
    counters["graph_break"].clear()
    compiled = torch.compile(module, backend="eager")
    with torch.no_grad():
        for x in inputs:
            torch.testing.assert_close(compiled(x), module(x), rtol=1e-4, atol=1e-4)
    return dict(counters["graph_break"])


def test_graphs_of_several_sizes_are_whole():
    block = AggregatedAttention(16, num_heads=2, pool_ratio=2).eval()
    assert graph_breaks(block, [torch.randn(1, side, side + 2, 16) for side in (6, 8, 9)]) == {}


@pytest.mark.slow
def test_graphs_of_a_model_are_whole():
    model = timm.create_model("transnext_pico").eval()
    assert graph_breaks(model, [torch.randn(1, 3, side, side) for side in (64, 96, 128)]) == {}
