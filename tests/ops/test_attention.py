import os
import subprocess
import sys
from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from foveal import ops
from foveal.ops import PositionBias, reference
from tests.ops.half_operands import assert_accurate
from tests.ops.helpers import DTYPES, assert_as_accurate, needs_compiler, on_devices, poisoned_memory, results

OPTIONAL = ("query_embedding", "window_bias", "pool_bias", "positional_tokens", "positional_bias")


class Case(NamedTuple):
    grid: tuple[int, int]
    pool: tuple[int, int]
    heads: int = 2
    dim: int = 24
    window: int = 3
    batch: int = 2

    def __str__(self) -> str:
        return "-".join(map(str, self)).replace(" ", "")


# One-cell maps and pools, maps smaller than the window, sides that do not divide, tiles short of a vector and past it,
# pooled keys past one chunk, every specialised head dimension and others, no image.
CASES = [
    Case((1, 1), (1, 1), dim=8),
    Case((1, 5), (1, 2), dim=16, window=5),
    Case((7, 1), (3, 1), heads=1),
    Case((2, 3), (2, 2), window=7, dim=10),
    Case((5, 9), (2, 3), heads=3),
    Case((14, 14), (7, 7), heads=3, batch=3),
    Case((9, 33), (9, 11), dim=32, batch=1),
    Case((6, 17), (4, 5), dim=40, window=1),
    Case((11, 20), (5, 6), heads=5, dim=64, batch=1, window=5),
    Case((4, 6), (3, 4), dim=128, batch=1),
    Case((20, 18), (13, 11), heads=1),
    Case((3, 130), (1, 1), heads=1, dim=4, batch=1),
    Case((4, 4), (2, 2), batch=0),
]


def relative_bias(case: Case, dtype: torch.dtype) -> PositionBias:
    """As log-CPB makes it: the index rises by 2 from one query to the next."""
    indices = []
    for side, pooled in zip(case.grid, case.pool, strict=True):
        centres = torch.tensor([a * side // pooled + -(-(a + 1) * side // pooled) - 1 for a in range(pooled)])
        offsets = 2 * torch.arange(side)[:, None] - centres
        indices.append(offsets - offsets.min())
    table = torch.randn(case.heads, *(int(index.max()) + 1 for index in indices))
    return PositionBias(table.to(dtype), *indices)


def scattered_bias(case: Case, dtype: torch.dtype) -> PositionBias:
    """An index without any order, of which many pairs share an entry."""
    rows, columns = (torch.randint(0, 4, pair) for pair in zip(case.grid, case.pool, strict=True))
    return PositionBias(torch.randn(case.heads, 4, 4).to(dtype), rows, columns)


def dense_bias(case: Case, dtype: torch.dtype) -> PositionBias:
    return PositionBias.from_dense(torch.randn(case.heads, *case.grid, *case.pool).to(dtype))


def key_bias(case: Case, dtype: torch.dtype) -> PositionBias:
    return PositionBias.per_key(torch.randn(case.heads, *case.pool).to(dtype), case.grid)


def make(case, dtype=torch.float32, parameter_dtype=None, without=(), bias=relative_bias):
    """A function of tensors alone, and the tensors: projections of q, k, v and pooled k, v, then parameters."""
    parameter_dtype = parameter_dtype or dtype
    heads, dim, cells = case.heads, case.dim, case.window**2
    shapes = {
        "scale": (heads,),
        "query_embedding": (heads, dim),
        "window_bias": (heads, cells),
        "positional_tokens": (heads, dim, cells),
        "positional_bias": (heads, cells),
    }
    position_bias = bias(case, parameter_dtype)
    tensors = {
        "qkv": torch.randn(case.batch, *case.grid, 3 * heads * dim).to(dtype),
        "kv": torch.randn(case.batch, *case.pool, 2 * heads * dim).to(dtype),
        **{name: torch.randn(shape).to(parameter_dtype) for name, shape in shapes.items()},
        "pool_bias": position_bias.table,
    }
    tensors["scale"] = (0.5 + torch.rand(heads)).to(parameter_dtype)
    # The scale's gradient is one sum over all queries, whose terms cancel: it has a test of its own.
    tensors = {name: None if name in without else x.requires_grad_(name != "scale") for name, x in tensors.items()}

    def function(*values, length_scaled=True, normalize=True, input_bias=None):
        named = dict(zip(tensors, values, strict=True))
        q, k, v = named.pop("qkv").unflatten(-1, (3, heads, dim)).unbind(3)
        k_pool, v_pool = named.pop("kv").unflatten(-1, (2, heads, dim)).unbind(3)
        table = named.pop("pool_bias")
        return ops.aggregated_attention(
            q,
            k,
            v,
            k_pool,
            v_pool,
            **named,
            pool_bias=None if table is None else position_bias._replace(table=table),
            window_size=case.window,
            length_scaled=length_scaled,
            normalize=normalize,
            input_bias=input_bias,
        )

    return function, list(tensors.values())


def raw_arguments(case, dtype=torch.float32, parameter_dtype=None):
    """Arguments of the op itself."""
    captured = []
    function, tensors = make(case, dtype, parameter_dtype)
    with pytest.MonkeyPatch.context() as patch, ops.backend("reference"):
        patch.setattr(reference, "aggregated_attention", lambda *args: captured.extend(args))
        function(*tensors)
    return captured[:-1]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("case", [Case((3, 2), (2, 1), dim=3), Case((2, 4), (1, 3), dim=2, window=5, batch=1)], ids=str)
def test_reference_has_right_gradients(case, normalize):
    function, tensors = make(case, torch.float64)
    with ops.backend("reference"):
        assert torch.autograd.gradcheck(partial(function, normalize=normalize), tensors, fast_mode=True)


@on_devices
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiled_is_as_accurate_as_the_reference(case, dtype):
    with poisoned_memory():
        assert_accurate(*make(case, dtype, parameter_dtype=max(dtype, torch.float32, key=lambda t: t.itemsize)))


@on_devices
@pytest.mark.parametrize("bias", [scattered_bias, dense_bias, key_bias])
@pytest.mark.parametrize("case", CASES[4:7], ids=str)
def test_any_index_of_the_pooled_bias(case, bias):
    with poisoned_memory():
        assert_as_accurate(*make(case, bias=bias))


@on_devices
@pytest.mark.parametrize("absent", range(1 << len(OPTIONAL)))
def test_optional_inputs(absent):
    without = [name for i, name in enumerate(OPTIONAL) if absent >> i & 1]
    assert_as_accurate(*make(Case((4, 5), (2, 2), dim=12), without=without))


@on_devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("length_scaled", "normalize"), [(True, False), (False, True), (False, False)])
def test_options(length_scaled, normalize, dtype):
    function, tensors = make(Case((5, 6), (2, 3), batch=1), dtype)
    with torch.no_grad():
        tensors[2].mul_(0.3)  # the scale: without norms, logits are large
    assert_as_accurate(partial(function, length_scaled=length_scaled, normalize=normalize), tensors)


@needs_compiler
@pytest.mark.parametrize("wanted", [1 << i for i in range(8) if i != 2] + [0b11, 0b10000001])
def test_gradients_one_by_one(wanted):
    function, tensors = make(Case((5, 18), (2, 3)), torch.float64)
    tensors = [x.detach().requires_grad_(bool(wanted >> i & 1)) for i, x in enumerate(tensors)]
    with poisoned_memory():
        assert_as_accurate(function, tensors)


@on_devices
@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_of_the_scale(dtype, alone, device):
    """Scaling logits is scaling queries: the gradient is the sum of q . dq, its error a part of that of |q . dq|."""
    maps = [torch.randn(2, 20, 18, 3, 24).to(dtype).requires_grad_(not alone) for _ in range(3)]
    pooled = [torch.randn(2, 5, 4, 3, 24).to(dtype) for _ in range(2)]
    scale = torch.tensor([0.1, 0.2, 0.3], dtype=max(dtype, torch.float32, key=lambda t: t.itemsize)).requires_grad_()

    def function(q, k, v, scale):
        options = {"window_size": 3, "scale": scale, "length_scaled": True, "normalize": False}
        return ops.aggregated_attention(q, k, v, *(x.to(q) for x in pooled), **options)

    compiled = results(function, [*maps, scale], "compiled")[-1]
    doubles = [x.detach().double().requires_grad_() for x in (*maps, scale)]
    _, grad_q, *_, exact = results(function, doubles, "reference", dtype)
    terms = (doubles[0] * grad_q).abs().sum(dim=(0, 1, 2, 4)) / scale
    eps = torch.finfo(scale.dtype if device == "cpu" else dtype).eps  # tensor cores multiply half types as they are
    assert ((compiled - exact).abs() <= 8 * eps * terms).all()


@on_devices
@pytest.mark.parametrize(
    ("dtype", "parameter_dtype"),
    [
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.float16),
        (torch.bfloat16, torch.bfloat16),
    ],
)
def test_parameters_of_another_dtype(dtype, parameter_dtype):
    function, tensors = make(Case((5, 6), (2, 3)), dtype, parameter_dtype)
    compiled, plain = (results(function, tensors, name) for name in ("compiled", "reference"))
    for ours, theirs in zip(compiled, plain, strict=True):
        assert ours.dtype == theirs.dtype
        scale = theirs.abs().max().double().item()
        coarsest = max(torch.finfo(t).eps for t in (dtype, parameter_dtype))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=4 * coarsest * max(scale, 1))


def masked(dtype, parameter_dtype=None):
    """Biases of -inf: some queries see no pooled key, some pooled keys and some cells of the window are never seen."""
    function, tensors = make(Case((5, 6), (2, 3)), dtype, parameter_dtype, bias=dense_bias)
    window_bias, table = tensors[4], tensors[7]
    with torch.no_grad():
        window_bias[0, 0] = window_bias[1, 5] = float("-inf")
        table[:, :4] = float("-inf")  # rows of the table are queries' rows with pooled rows
        table[:, :, 6:8] = float("-inf")
    return function, tensors


@on_devices
@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_keys(dtype):
    assert_accurate(*masked(dtype, max(dtype, torch.float32, key=lambda t: t.itemsize)))


@on_devices
def test_log_sum_exp():
    arguments = raw_arguments(CASES[5])
    lse = torch.ops.foveal.aggregated_attention(*arguments)[1]
    expected = reference.aggregated_attention_with_lse(*arguments)[1]
    torch.testing.assert_close(lse, expected, rtol=1e-6, atol=1e-5)


@needs_compiler
def test_zero_vectors_and_large_logits():
    """Vectors of length zero cannot be normalised; the largest logit must not overflow."""
    function, tensors = make(Case((4, 5), (2, 2)), torch.float64)
    with torch.no_grad():
        tensors[0][:, 1] = 0
        tensors[1][:, 0] = 0
        tensors[2].mul_(300)
    for dtype in (torch.float32, torch.float64):
        inputs = [x.detach().to(dtype) for x in tensors]
        compiled, plain = (results(function, inputs, name)[0] for name in ("compiled", "reference"))
        torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-3 if dtype == torch.float32 else 1e-9)


@on_devices
def test_nan_stays_where_it_belongs():
    function, tensors = make(Case((5, 18), (2, 2), batch=1, heads=1))
    q = torch.zeros_like(tensors[0])
    q[0, 2, 4, 0] = float("nan")  # a query
    outs = [results(function, [(x + q if i == 0 else x).detach() for i, x in enumerate(tensors)], "compiled")[0]]
    outs.append(results(function, [x.detach() for x in tensors], "compiled")[0])
    assert outs[0][0, 2, 4].isnan().all()
    assert outs[0].isnan().sum() == outs[0].shape[-1]
    assert outs[0][0, 2, 5].equal(outs[1][0, 2, 5])


@on_devices
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, ::2, 1:],
        lambda x: x.transpose(1, 2),
        lambda x: x.flip(-1),
        lambda x: x[:1].expand(3, -1, -1, -1, -1),
        lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
        lambda x: F.pad(x.flatten(), (1, 0))[1:].view(x.shape),  # begins between the words of a vector
    ],
)
def test_strided_inputs_and_gradients(view):
    q, k, v = (torch.randn(2, 6, 8, 2, 12, requires_grad=True) for _ in range(3))
    batch = view(q).shape[0]
    k_pool, v_pool = (torch.randn(batch, 2, 2, 2, 12, requires_grad=True) for _ in range(2))

    def function(*x):
        views = [view(t) for t in x[:3]]
        out = ops.aggregated_attention(
            *views, *x[3:], window_size=3, scale=torch.ones(2).to(q.dtype), length_scaled=True, normalize=True
        )
        return out.transpose(1, 3)  # so that the gradient arrives strided too

    assert_as_accurate(function, [q, k, v, k_pool, v_pool])


@needs_compiler
def test_expanded_gradient():
    function, tensors = make(Case((5, 6), (2, 3)), torch.float64)
    grads = []
    for name in ("compiled", "reference"):
        with ops.backend(name):
            grads.append(torch.autograd.grad(function(*tensors).sum(), [x for x in tensors if x.requires_grad]))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@on_devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_opcheck(dtype):
    arguments = raw_arguments(Case((3, 4), (2, 2), dim=6), dtype, torch.float32)
    torch.library.opcheck(torch.ops.foveal.aggregated_attention, tuple(arguments))


@needs_compiler
def test_runs_repeat_bit_for_bit_and_agree_over_thread_counts():
    function, tensors = make(Case((20, 17), (7, 7), heads=3, batch=3))
    threads = torch.get_num_threads()
    first, again = (results(function, tensors, "compiled") for _ in range(2))
    try:
        torch.set_num_threads(1)
        alone = results(function, tensors, "compiled")
    finally:
        torch.set_num_threads(threads)
    for a, b, c in zip(first, again, alone, strict=True):
        assert a.equal(b)
        torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-4)


@needs_compiler
@pytest.mark.parametrize("threads", [3, 5, 16])
def test_images_shared_by_many_threads(threads):
    usual = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert_as_accurate(*make(Case((13, 9), (3, 2), heads=2, batch=1)))
        assert_as_accurate(*make(Case((5, 9), (3, 2), heads=3, batch=4, window=5)))
    finally:
        torch.set_num_threads(usual)


@on_devices
def test_compiles_as_one_graph_for_all_sizes_and_follows_the_backend():
    torch._dynamo.reset()
    graphs = []

    def collect(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(call_with_bias, fullgraph=True, dynamic=True, backend=collect)
    for batch, height, width in [(4, 5, 6), (3, 9, 4), (6, 12, 13)]:
        arguments = call_arguments(batch, height, width)
        torch.testing.assert_close(compiled(*arguments), call_with_bias(*arguments))
    assert len(graphs) == 1
    assert "foveal.aggregated_attention" in graphs[0].code
    with ops.backend("reference"):
        compiled(*arguments)
    assert "foveal.aggregated_attention" not in graphs[-1].code


def call_arguments(batch, height, width):
    bias = relative_bias(Case((height, width), (2, 3), heads=7), torch.float32)
    return torch.randn(batch, height, width, 3, 7, 8), torch.randn(batch, 2, 3, 2, 7, 8), torch.ones(7), *bias


def call_with_bias(qkv, kv, scale, table, rows, columns):
    bias = PositionBias(table, rows, columns)
    options = {"window_size": 3, "length_scaled": True, "normalize": True}
    return ops.aggregated_attention(*qkv.unbind(3), *kv.unbind(3), scale=scale, pool_bias=bias, **options)


def test_what_is_not_served_runs_on_the_reference_and_says_so():
    function, tensors = make(Case((2, 2), (1, 1), dim=130))
    assert function(*tensors).isfinite().all()
    with ops.backend("compiled"), pytest.raises(RuntimeError, match="a head dimension of 130"):
        function(*tensors)
    function, tensors = make(Case((3, 4), (0, 2)), bias=dense_bias)
    assert function(*tensors).isfinite().all()
    with ops.backend("compiled"), pytest.raises(RuntimeError, match="a pooled map without cells"):
        function(*tensors)
    qkv, kv, scale, *_ = call_arguments(1, 4, 4)
    options = {"window_size": 3, "length_scaled": True, "normalize": True, "dropout_p": 0.1}
    with ops.backend("compiled"), pytest.raises(RuntimeError, match="dropout"):
        ops.aggregated_attention(*qkv.unbind(3), *kv.unbind(3), scale=scale, **options)


def test_tensors_on_different_devices_are_refused():
    function, tensors = make(Case((3, 4), (2, 2)))
    for index, name in ((2, "scale"), (7, "pool_bias.table")):
        wrong = [x.to("meta") if i == index else x for i, x in enumerate(tensors)]
        with pytest.raises(ValueError, match=f"{name} must be on cpu like the activations, got meta"):
            function(*wrong)


@needs_compiler
def test_an_index_outside_the_table_is_an_error():
    arguments = raw_arguments(Case((3, 4), (2, 2)))
    arguments[9] = arguments[9] + 100
    with pytest.raises(IndexError, match="pool_rows must lie in"):
        torch.ops.foveal.aggregated_attention(*arguments)


@pytest.mark.parametrize("without", [(), ("positional_tokens",)])
def test_flops_are_those_of_the_reference(without):
    function, tensors = make(Case((6, 7), (3, 2)), without=without)
    counts = []
    for name in ("compiled", "reference"):
        with ops.backend(name), FlopCounterMode(display=False) as forward:
            out = function(*tensors)
        with FlopCounterMode(display=False) as backward:
            out.sum().backward()
        counts.append((forward.get_total_flops(), backward.get_total_flops()))
    assert counts[0] == counts[1]


@needs_compiler
@pytest.mark.parametrize("instructions", ["baseline", "avx2"])
def test_working_memory_is_written_before_it_is_read_with_any_instructions(instructions):
    """The C library fills what it hands out with garbage: the kernels' own scratch, not only tensors."""
    code = (
        "from tests.ops.test_attention import *\n"
        "torch.manual_seed(0)\n"
        "for case in CASES:\n"
        "    assert_as_accurate(*make(case, torch.float64))\n"
        "    function, tensors = make(case)\n"
        "    for ours, theirs in zip(*(results(function, tensors, name) for name in ('compiled', 'reference'))):\n"
        "        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)\n"
    )
    environment = {**os.environ, "MALLOC_PERTURB_": "85", "FOVEAL_CPU_ISA": instructions}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def with_input_bias(case, *args, **options):
    """The bias of the projection of q, k and v is the last tensor."""
    function, tensors = make(case, *args)
    tensors = [None if t is None else t.detach() for t in tensors]
    bias = torch.randn(3, case.heads, case.dim).to(tensors[0].dtype)
    return lambda *t: function(*t[:-1], input_bias=t[-1], **options), [*tensors, bias]


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_bias_of_the_input_without_a_pass_of_its_own(case, dtype):
    with poisoned_memory():
        assert_as_accurate(*with_input_bias(case, dtype))


@needs_compiler
@pytest.mark.parametrize("options", [{"normalize": False}, {"length_scaled": False}], ids=str)
def test_bias_of_the_input_with_options(options):
    assert_as_accurate(*with_input_bias(CASES[4], **options))


@needs_compiler
def test_bias_of_the_input_has_a_gradient():
    function, tensors = with_input_bias(CASES[4])
    assert_as_accurate(function, [tensors[0], *(None if t is None else t.requires_grad_() for t in tensors[1:])])


@needs_compiler
def test_opcheck_of_the_inference_op():
    case = Case((3, 4), (2, 2), heads=1, dim=8)
    arguments = [x.detach() if isinstance(x, torch.Tensor) else x for x in raw_arguments(case)]
    bias = torch.randn(3, 1, 8)
    torch.library.opcheck(torch.ops.foveal.aggregated_attention_with_input_bias.default, (bias, *arguments))


def test_bias_of_the_input_must_fit():
    function, tensors = make(CASES[4])
    with pytest.raises(ValueError, match=r"input_bias must have shape \(3, heads, d\) = \(3, 3, 24\), got \(3, 24\)"):
        function(*tensors, input_bias=torch.randn(3, 24))
