"""Any input: an op gives what its definition gives, or refuses it alike, and no call ends the process."""

import random
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from foveal import ops
from foveal.ops import PositionBias, backend, reference
from tests.ops.helpers import needs_compiler

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-3, torch.bfloat16: 4e-2, torch.float16: 1e-2}
TRIALS = 25
# As the docstrings of the ops say: where kernels have NaN that the definition has not, what else of theirs may differ
# where it is not finite, and an activation whose infinity is NaN in PyTorch.
MORE_NAN = {"depthwise_gate", "log_cpb_table"}
MAY_DIFFER = {("depthwise_gate", "weight"), ("depthwise_gate", "input_bias")}
ACTS_OF_INFINITIES = [act for act in reference.ACTIVATIONS if act != "gelu"]

KINDS = ("zeros", "strides", "dtypes", "values", "shapes", "indices")

Sizes = dict[str, int]
Tensors = dict[str, Tensor]


class Op(NamedTuple):
    """Shapes are sizes by name; one that begins with ``?`` is now and then left out. Maps share a dtype."""

    maps: dict[str, str]
    parameters: dict[str, str]
    call: Callable[[Tensors, Sizes, dict], Tensor | tuple[Tensor, ...]]


def call_attention(tensors, sizes, options):
    tensors = dict(tensors)
    bias = [tensors.pop(name, None) for name in PositionBias._fields]
    return ops.aggregated_attention(
        **tensors,
        window_size=sizes["k"],
        length_scaled=options["length_scaled"],
        normalize=options["normalize"],
        pool_bias=None if None in bias else PositionBias(*bias),
    )


OPS = {
    "depthwise_gate": Op(
        {"x": "B H W 2C"},
        {"weight": "C 1 k k", "bias": "? C", "input_bias": "? 2C"},
        lambda tensors, sizes, options: ops.depthwise_gate(**tensors, act=options["act"]),
    ),
    "activate_and_pool": Op(
        {"x": "B H W C"},
        {"input_bias": "? C"},
        lambda tensors, sizes, options: ops.activate_and_pool(
            grid=(sizes["Hp"], sizes["Wp"]), act=options["act"], **tensors
        ),
    ),
    "window_scores": Op(
        dict.fromkeys("qk", "B H W n d"),
        {},
        lambda tensors, sizes, options: ops.window_scores(**tensors, window_size=sizes["k"]),
    ),
    "window_sum": Op(
        {"weights": "B H W n kk", "v": "B H W n d"},
        {},
        lambda tensors, sizes, options: ops.window_sum(**tensors, window_size=sizes["k"]),
    ),
    "aggregated_attention": Op(
        {**dict.fromkeys("qkv", "B H W n d"), **dict.fromkeys(("k_pool", "v_pool"), "B Hp Wp n d")},
        {
            "scale": "n",
            "query_embedding": "? n d",
            "window_bias": "? n kk",
            "table": "? n Th Tw",
            "positional_tokens": "? n d kk",
            "positional_bias": "? n kk",
            "input_bias": "? 3 n d",
        },
        call_attention,
    ),
    "add_layer_norm": Op(
        {"x": "B H C", "y": "? B H C", "y_bias": "? C", "weight": "? C", "bias": "? C"},
        {},
        lambda tensors, *_: ops.add_layer_norm(**tensors),
    ),
    "log_cpb_table": Op(
        {},
        {"rows": "Th", "columns": "Tw", "weight1": "Tn 2", "bias1": "Tn", "weight2": "n Tn", "bias2": "n"},
        lambda tensors, *_: ops.log_cpb_table(**tensors),
    ),
}


def draw_sizes(draw: random.Random, zeros: bool) -> Sizes:
    most = {"B": 3, "H": 9, "W": 20, "C": 21, "n": 3, "d": 26, "Hp": 4, "Wp": 4, "Th": 7, "Tw": 7, "Tn": 18}
    sizes = {name: draw.randint(1, limit) for name, limit in most.items()}
    if zeros:
        sizes |= dict.fromkeys(draw.sample(list(most), draw.choice((1, 1, 1, 2))), 0)
    k = draw.choice((1, 3, 3, 5))
    return sizes | {"k": k, "kk": k * k, "2C": 2 * sizes["C"], "1": 1, "2": 2, "3": 3}


def any_view(x: Tensor, draw: random.Random) -> Tensor:
    """x with strides of another kind: of a slice, of a permutation, expanded."""
    if x.dim() == 0:
        return x
    dim, kind = draw.randrange(x.dim()), draw.randrange(4)
    if kind == 0:  # every second of more, from the third on
        wide = torch.full([2 * size + 3 if i == dim else size for i, size in enumerate(x.shape)], float("nan")).to(x)
        view = wide[(slice(None),) * dim + (slice(2, 2 + 2 * x.shape[dim], 2),)]
        view.copy_(x)
        return view
    if kind == 1:
        order = draw.sample(range(x.dim()), x.dim())
        return x.permute(order).contiguous().permute([order.index(i) for i in range(x.dim())])
    if kind == 2 and x.shape[dim]:
        return x.narrow(dim, 0, 1).expand(x.shape)
    return x


def poison(x: Tensor, draw: random.Random) -> None:
    for _ in range(draw.randint(1, 2)):
        x[tuple(draw.randrange(size) for size in x.shape)] = draw.choice((float("nan"), float("inf"), -float("inf")))


def misshape(x: Tensor, draw: random.Random) -> Tensor:
    if draw.random() < 0.3:
        return x[None] if draw.random() < 0.5 or x.dim() == 1 else x[0]
    dim = draw.randrange(x.dim())
    return x.narrow(dim, 0, x.shape[dim] - 1) if draw.random() < 0.5 else torch.cat([x, x.narrow(dim, 0, 1)], dim)


def trial(name: str, kind: str, seed: int) -> tuple[Callable[[Tensors], Tensor | tuple[Tensor, ...]], Tensors]:
    """A call of an op, and its tensors."""
    op, draw = OPS[name], random.Random(f"{name} {kind} {seed}")
    torch.manual_seed(seed)
    sizes = draw_sizes(draw, zeros=kind == "zeros")
    options = {
        "act": draw.choice(ACTS_OF_INFINITIES if kind == "values" else list(reference.ACTIVATIONS)),
        "length_scaled": draw.random() < 0.5,
        "normalize": draw.random() < 0.5,
    }
    dtype = draw.choice(DTYPES[:3])
    tensors: Tensors = {}
    for argument, shape in (op.maps | op.parameters).items():
        optional, axes = shape.startswith("?"), shape.removeprefix("?").split()
        if optional and draw.random() < 0.4:
            continue
        own = draw.choice(DTYPES) if kind == "dtypes" and (argument in op.parameters or draw.random() < 0.1) else dtype
        tensors[argument] = torch.randn([sizes[axis] for axis in axes]).to(own)
    if "table" in tensors:
        for argument, pair, side in (("row_index", ("H", "Hp"), "Th"), ("column_index", ("W", "Wp"), "Tw")):
            tensors[argument] = torch.randint(max(1, sizes[side]), [sizes[axis] for axis in pair])
    if kind == "values":
        finite = {argument for op, argument in MAY_DIFFER if op == name}
        poison(draw.choice([x for key, x in tensors.items() if x.is_floating_point() and key not in finite]), draw)
    if kind == "shapes":
        chosen = draw.choice(list(tensors))
        tensors[chosen] = misshape(tensors[chosen], draw)
    if kind == "dtypes" and draw.random() < 0.2:
        chosen = draw.choice(list(tensors))
        tensors[chosen] = tensors[chosen].to(draw.choice((torch.int32, torch.int64, torch.bool)))
    if kind == "indices" and "table" in tensors:
        index = tensors[draw.choice(("row_index", "column_index"))]
        index.view(-1)[draw.randrange(index.numel())] = draw.choice((-1, 7, -(2**62), 2**62))
    if kind == "strides":
        tensors = {key: any_view(x, draw) for key, x in tensors.items()}
    return lambda inputs: op.call(inputs, sizes, options), tensors


def outcome(call: Callable, tensors: Tensors, name: str, differentiated: bool) -> list[Tensor] | Exception:
    """By a backend: results and gradients, or what was raised instead."""
    inputs = {
        key: x.detach().requires_grad_(differentiated and x.is_floating_point() and key not in ("rows", "columns"))
        for key, x in tensors.items()
    }
    try:
        with backend(name), torch.set_grad_enabled(differentiated):
            out = call(inputs)
        outs = [out] if isinstance(out, Tensor) else list(out)
        leaves = [x for x in inputs.values() if x.requires_grad]
        if not leaves:
            return outs
        generator = torch.Generator().manual_seed(1)
        upstream = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in outs]
        return [*outs, *torch.autograd.grad(outs, leaves, upstream, allow_unused=True, materialize_grads=True)]
    except (ValueError, TypeError, IndexError, RuntimeError) as error:
        return error


def assert_same(ours: list[Tensor] | Exception, theirs: list[Tensor] | Exception, more_nan: bool = False) -> None:
    if isinstance(ours, Exception) or isinstance(theirs, Exception):
        assert type(ours) is type(theirs), f"{ours!r} and not {theirs!r}"
        return
    tolerance = max(TOLERANCE[x.dtype] for x in (*ours, *theirs))
    for i, (x, y) in enumerate(zip(ours, theirs, strict=True)):
        assert (x.shape, x.dtype) == (y.shape, y.dtype), (
            f"result {i}: {x.shape}, {x.dtype} and not {y.shape}, {y.dtype}"
        )
        x, y = x.detach().double(), y.detach().double()
        scale = y[y.isfinite()].abs().max().clamp(min=1) if y.isfinite().any() else 1.0
        y = torch.where(x.isnan(), x, y) if more_nan else y
        torch.testing.assert_close(
            x, y, rtol=0, atol=float(tolerance * scale), equal_nan=True, msg=lambda m, i=i: f"result {i}: {m}"
        )


@needs_compiler
@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in OPS for kind in KINDS if kind != "indices" or name == "aggregated_attention"],
)
def test_as_the_definition(name, kind):
    for seed in range(TRIALS):
        call, tensors = trial(name, kind, seed)
        for differentiated in (False, True):
            plain, compiled, auto = (
                outcome(call, tensors, which, differentiated) for which in ("reference", "compiled", "auto")
            )
            unserved = isinstance(compiled, RuntimeError) and "the backend is 'compiled', but" in str(compiled)
            try:
                for ours in (auto,) if unserved else (auto, compiled):
                    assert_same(ours, plain, kind == "values" and name in MORE_NAN)
            except AssertionError as error:
                what = {key: (tuple(x.shape), x.stride(), x.dtype) for key, x in tensors.items()}
                raise AssertionError(f"seed {seed}, differentiated {differentiated}: {error}\n{what}") from None


@needs_compiler
@pytest.mark.parametrize(("argument", "value"), [*product(("weight", "input_bias"), (float("nan"), float("inf")))])
def test_parameters_of_the_gate_stay_in_their_channel(argument, value):
    tensors = {"x": (2, 6, 9, 40), "weight": (20, 1, 3, 3), "bias": (20,), "input_bias": (40,)}
    tensors = {name: torch.randn(shape) for name, shape in tensors.items()}
    differentiated = argument == "weight"
    clean = outcome(lambda inputs: ops.depthwise_gate(**inputs, act="identity"), tensors, "compiled", differentiated)
    tensors[argument][5] = value
    found = outcome(lambda inputs: ops.depthwise_gate(**inputs, act="identity"), tensors, "compiled", differentiated)
    assert not found[0][..., 5].isfinite().any()
    channel_axes = (-1, -1, 0, 0, 0)
    for before, after, axis in zip(clean, found, channel_axes[: len(clean)], strict=True):
        others = [c for c in range(before.shape[axis]) if c % 20 != 5]
        assert before.index_select(axis, torch.tensor(others)).equal(after.index_select(axis, torch.tensor(others)))


@needs_compiler
def test_hostile_calls_of_ops_are_refused():
    """What no public function lets through. A crash of the process names the call that was last."""
    ran = subprocess.run([sys.executable, "-m", "tests.ops.hostile_calls"], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, f"ended with {ran.returncode} at {ran.stderr[-2000:]}"
    assert not ran.stdout, ran.stdout
