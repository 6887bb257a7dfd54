"""log-CPB: its offsets, its coordinates, its table, and the bias kept in eval mode."""

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from foveal.blocks import AggregatedAttention, LengthScaledCosineAttention, LogCPB
from foveal.blocks import log_cpb as log_cpb_file
from foveal.blocks.log_cpb import log_spaced, relative_offsets, window_bias
from foveal.ops import backend
from foveal.ops import log_cpb as log_cpb_op
from tests.blocks import naive
from tests.helpers import assert_near, gradcheck_module, randomised

CPU = torch.device("cpu")
sides = st.integers(1, 40)
grids = st.tuples(st.integers(1, 5), st.integers(1, 5))


@settings(deadline=None, max_examples=300)
@given(queries=sides, keys=sides)
def test_offsets_are_to_the_centres_of_adaptive_pooling(queries, keys):
    rows = torch.arange(queries, dtype=torch.float64)
    centres = F.adaptive_avg_pool2d(rows.view(1, 1, -1, 1), (keys, 1)).view(-1)
    offsets, index = relative_offsets(queries, keys, CPU)
    assert_near(offsets[index].double() + 1, rows[:, None] - centres + 1, tol=1e-12)
    assert offsets.dtype == torch.float32
    assert (offsets.diff() > 0).all()
    assert index.min() == 0
    assert index.max() == len(offsets) - 1
    assert len(offsets) <= 4 * max(queries, keys) - 3


@pytest.mark.parametrize("length", [2, 7, 56])
def test_log_spacing(length):
    """The ends of the pre-training axis lie at plus and minus log2(9) / 3, and the scale is odd and monotonic."""
    offset = torch.linspace(-2 * length, 2 * length, 101, dtype=torch.float64)
    coordinate = log_spaced(offset, length)
    expected = offset.sign() * torch.log2(1 + offset.abs() / (length - 1) * 8) / torch.log2(torch.tensor(8.0))
    assert_near(coordinate, expected)
    assert (coordinate.diff() > 0).all()


def test_an_axis_of_one_cell_has_no_coordinates():
    assert torch.equal(log_spaced(torch.arange(-3.0, 4.0), 1), torch.zeros(7))


@settings(deadline=None, max_examples=25)
@given(query_grid=grids, key_grid=grids, pretrain_grid=grids)
def test_bias_equals_the_mlp_on_every_pair(query_grid, key_grid, pretrain_grid):
    module = randomised(LogCPB(2, hidden_dim=16, dtype=torch.float64))
    dense = module(query_grid, key_grid, pretrain_grid).dense().view(2, *query_grid, *key_grid)
    for index in torch.cartesian_prod(*map(torch.arange, (*query_grid, *key_grid))).view(-1, 4).tolist():
        bins = [naive.pooling_bin(query_grid[axis], key_grid[axis], index[2 + axis]) for axis in (0, 1)]
        offset = tuple(index[axis] - sum(bins[axis]) / len(bins[axis]) for axis in (0, 1))
        expected = naive.log_cpb(module, offset, pretrain_grid)
        torch.testing.assert_close(dense[(slice(None), *index)], expected, rtol=1e-9, atol=1e-9)


def test_window_bias_is_the_mlp_on_every_cell():
    module = randomised(LogCPB(2, dtype=torch.float64))
    cells = [(i, j) for i in range(-2, 3) for j in range(-2, 3)]
    expected = torch.stack([naive.log_cpb(module, cell, (6, 9)) for cell in cells], dim=1)
    assert_near(window_bias(module, 5, (6, 9)), expected, tol=1e-9)


@pytest.mark.parametrize("elements", [1, 3000, 40000])
def test_big_tables_in_parts(elements, monkeypatch):
    """Evaluated a few rows at a time, forward and backward, the table is the same."""
    module = randomised(LogCPB(3, hidden_dim=32))

    def run():
        module.zero_grad()
        table = module((9, 13), (4, 5), (9, 13)).table
        table.square().sum().backward()
        return [table, *(p.grad for p in module.parameters())]

    whole = run()
    monkeypatch.setattr(log_cpb_op, "_HIDDEN_ELEMENTS", elements)
    for in_parts, expected in zip(run(), whole, strict=True):
        assert_near(in_parts, expected, tol=1e-5)


def test_gradients_numerically():
    class Dense(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.log_cpb = randomised(LogCPB(2, hidden_dim=8))

        def forward(self, x):
            return x * self.log_cpb((3, 4), (2, 2), (3, 4)).dense()

    gradcheck_module(Dense(), torch.ones(1))


def test_float32_whatever_the_parameters():
    for dtype, expected in [(torch.bfloat16, torch.float32), (torch.float32,) * 2, (torch.float64,) * 2]:
        module = LogCPB(2, dtype=dtype)
        assert module((3, 3), (2, 2), (3, 3)).table.dtype == expected
        assert window_bias(module, 3, (3, 3)).dtype == expected


# What eval mode keeps from one call to the next.

KINDS = {
    "aggregated attention": lambda: AggregatedAttention(8, 2, pool_ratio=2),
    "window log-CPB": lambda: AggregatedAttention(8, 2, pool_ratio=2, window_bias="log-cpb"),
    "cosine attention": lambda: LengthScaledCosineAttention(8, 2),
    "interpolated": lambda: AggregatedAttention(8, 2, bias_resampling="interpolate", bias_grid=4),
}


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def build(request):
    return request.param


@pytest.fixture
def calls(monkeypatch):
    """How often a table has been made."""
    made = []
    table = log_cpb_file.log_cpb_table
    monkeypatch.setattr(log_cpb_file, "log_cpb_table", lambda *args: made.append(1) or table(*args))
    return made


def warm(build, x):
    """A block in eval mode that has kept its bias for x."""
    block = randomised(build()).eval()
    with torch.no_grad():
        block(x)
    return block


def assert_fresh(block, build, x):
    """The block computes what a new one with the same weights and dtype does."""
    fresh = build().to(block.qkv.weight.dtype)
    fresh.load_state_dict(block.state_dict())
    with torch.no_grad():
        assert_near(block(x), fresh.train(block.training)(x), tol=1e-6)


def test_eval_makes_the_bias_once_per_size(calls):
    block = AggregatedAttention(8, 2).eval()
    with torch.no_grad():
        for side in (4, 5, 4, 5, 4):
            block(torch.randn(1, side, side, 8))
    assert len(calls) == 2


@pytest.mark.parametrize(("training", "grad"), [(True, True), (True, False), (False, True)])
def test_training_makes_the_bias_every_time(calls, training, grad):
    block = AggregatedAttention(8, 2).train(training)
    with torch.set_grad_enabled(grad):
        for _ in range(3):
            block(torch.randn(1, 4, 4, 8))
    assert len(calls) == 3


def test_the_kept_biases_are_bounded(calls):
    block = AggregatedAttention(8, 2).eval()
    with torch.no_grad():
        for side in (*range(1, 41), 1):
            block(torch.randn(1, side, 3, 8))
    assert len(calls) == 41
    assert len(block.log_cpb._kept._entries) <= 4


def test_load_state_dict(build):
    x = torch.randn(1, 5, 6, 8)
    for assign in (False, True):
        block = warm(build, x)
        block.load_state_dict(randomised(build()).state_dict(), assign=assign)
        assert_fresh(block, build, x)


@pytest.mark.parametrize("change", ["half", "double"])
def test_dtype_change(build, change):
    x = torch.randn(1, 5, 6, 8)
    block = warm(build, x)
    before = block(x).detach()
    block = block.bfloat16().float() if change == "half" else block.double()
    x = x.to(block.qkv.weight.dtype)
    assert_fresh(block, build, x)
    assert_near(block(x).detach().float(), before, tol=0.05)


def test_optimiser_step_in_eval_mode(build):
    x = torch.randn(1, 5, 6, 8)
    block = warm(build, x)
    block(x).square().sum().backward()
    torch.optim.SGD(block.log_cpb.parameters(), lr=1.0).step()
    assert_fresh(block, build, x)


WRITES = {
    "data": lambda weights: [w.data.mul_(3) for w in weights],
    "data set": lambda weights: [setattr(w, "data", 3 * w.data) for w in weights],
    "vector_to_parameters": lambda weights: torch.nn.utils.vector_to_parameters(
        3 * torch.nn.utils.parameters_to_vector(weights), weights
    ),
    "a view": lambda weights: [w.detach().mul_(3) for w in weights],
    "numpy": lambda weights: [w.detach().numpy().__imul__(3) for w in weights],
    "copy_ of averaged weights": lambda weights: [w.data.copy_(3 * w.data) for w in weights],
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_write_that_leaves_no_trace(build, write):
    x = torch.randn(1, 5, 6, 8)
    block = warm(build, x)
    with torch.no_grad():
        write(list(block.log_cpb.parameters()))
    assert_fresh(block, build, x)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD, torch.optim.Adagrad])
def test_fine_tuning_in_eval_mode_by_a_fused_optimiser(build, kind):
    """Its step does not advance the version of a parameter."""
    x = torch.randn(1, 5, 6, 8)
    block = warm(build, x)
    optimizer = kind(block.parameters(), lr=0.5, fused=True)
    for _ in range(2):
        optimizer.zero_grad()
        block(x).square().sum().backward()
        optimizer.step()
        assert_fresh(block, build, x)


def test_weights_averaged_and_swapped_for_validation(build):
    x = torch.randn(1, 5, 6, 8)
    block = warm(build, x)
    averaged = torch.optim.swa_utils.AveragedModel(block, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    for _ in range(3):
        with torch.no_grad():
            for parameter in block.parameters():
                parameter.add_(torch.randn_like(parameter))
        averaged.update_parameters(block)
        with torch.no_grad():
            averaged.module(x)
        assert_fresh(averaged.module.eval(), build, x)
        for ours, theirs in zip(block.parameters(), averaged.module.parameters(), strict=True):
            ours.data, theirs.data = theirs.data, ours.data
        assert_fresh(block, build, x)


def test_weights_that_are_switched_on_and_off_in_eval_mode(build):
    """As adapters are; also where they come back as they were."""
    x = torch.randn(1, 5, 6, 8)
    block = warm(build, x)
    with torch.no_grad():
        plain = block(x)
        handle = block.log_cpb.fc1.register_forward_hook(lambda module, args, out: 2 * out)
        assert not torch.allclose(block(x), plain)
        handle.remove()
        assert torch.equal(block(x), plain)


def test_replicas_of_data_parallel_keep_nothing(build):
    """They share their original's attributes, and hold other devices' weights as plain attributes."""
    x = torch.randn(1, 5, 6, 8)
    block = warm(build, x)
    replica = block.log_cpb._replicate_for_data_parallel()
    for name in ("fc1", "fc2"):
        layer = getattr(block.log_cpb, name)._replicate_for_data_parallel()
        for key, weight in getattr(block.log_cpb, name)._parameters.items():
            setattr(layer, key, -weight.detach())
        replica._modules[name] = layer
    with torch.no_grad():
        ours = replica((5, 6), (2, 3), (5, 6), like=x).table
        other = copy.deepcopy(block.log_cpb)
        for parameter in other.parameters():
            parameter.neg_()
        assert_near(ours, other((5, 6), (2, 3), (5, 6)).table, tol=1e-6)
    assert_fresh(block, build, x)


def test_what_is_handed_out_may_be_written_to():
    """A hook that alters the bias in place alters it once, and a written index is nobody else's."""
    block, x = randomised(AggregatedAttention(8, 2)).eval(), torch.randn(1, 5, 6, 8)
    block.log_cpb.register_forward_hook(lambda module, args, out: [out.table.mul_(1.5), None][1])
    with torch.no_grad():
        first = block(x)
        assert torch.equal(block(x), first)
        LogCPB(2).eval()((4, 4), (2, 2), (4, 4)).row_index.zero_()
        assert LogCPB(2).eval()((4, 4), (2, 2), (4, 4)).row_index.any()


def test_each_backend_keeps_its_own():
    module = randomised(LogCPB(2)).eval()
    with torch.no_grad():
        grids = (9, 13), (4, 5), (9, 13)
        module(*grids)
        with backend("reference"):
            kept = module(*grids).table
            assert torch.equal(kept, copy.deepcopy(module)(*grids).table)


def test_not_a_number_is_never_kept(build, calls):
    block = warm(build, torch.randn(1, 5, 6, 8))
    with torch.no_grad():
        block.log_cpb.fc2.bias.fill_(float("nan"))
        assert block(torch.randn(1, 5, 6, 8)).isnan().any()
        block.log_cpb.fc2.bias.zero_()
        assert block(torch.randn(1, 5, 6, 8)).isfinite().all()


def test_replaced_parameter(build):
    x = torch.randn(1, 5, 6, 8)
    block = warm(build, x)
    for _ in range(8):  # a new parameter may well stand where the last one stood
        block.log_cpb.fc2.weight = torch.nn.Parameter(torch.randn_like(block.log_cpb.fc2.weight))
        assert_fresh(block, build, x)


@pytest.mark.parametrize("wrap", [torch.Tensor.clone, torch.nn.Parameter], ids=["tensor", "parameter"])
def test_functional_call(build, wrap):
    x = torch.randn(1, 5, 6, 8)
    block, other = warm(build, x), randomised(build()).eval()
    with torch.no_grad():
        state = {name: wrap(value) for name, value in other.state_dict().items()}
        assert_near(torch.func.functional_call(block, state, (x,)), other(x), tol=1e-6)
        assert_fresh(block, build, x)


def copied_by_pickle(block):
    return pickle.loads(pickle.dumps(block))


def copied_by_torch_save(block):
    buffer = io.BytesIO()
    torch.save(block, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, copied_by_pickle, copied_by_torch_save])
def test_copies_keep_their_own(build, copied):
    x = torch.randn(1, 5, 6, 8)
    block = warm(build, x)
    twin = copied(block)
    with torch.no_grad():
        assert torch.equal(twin(x), block(x))
        twin.log_cpb.fc2.weight.mul_(-2)
    assert_fresh(twin, build, x)
    assert_fresh(block, build, x)


def test_nothing_kept_is_saved(build):
    x = torch.randn(1, 5, 6, 8)
    assert warm(build, x).state_dict().keys() == build().state_dict().keys()
    assert not list(warm(build, x).buffers())


def test_threads(build):
    block = randomised(build()).eval()
    inputs = [torch.randn(1, side, side + 1, 8) for side in (1, 2, 3, 4, 5, 6)] * 20
    with torch.no_grad():
        expected = [copy.deepcopy(block)(x) for x in inputs[:6]] * 20

    def run(x):
        with torch.no_grad():
            return block(x)

    with ThreadPoolExecutor(8) as pool:
        for actual, wanted in zip(pool.map(run, inputs), expected, strict=True):
            assert torch.equal(actual, wanted)


def test_training_after_inference_mode(build):
    block = randomised(build()).eval()
    x = torch.randn(1, 5, 6, 8)
    with torch.inference_mode():
        first = block(x)
    second = block(x)
    second.sum().backward()
    block.train()(x).sum().backward()
    assert_near(first, second.detach())
    assert all(p.grad is not None for p in block.parameters())


def test_what_inference_mode_leaves_behind_can_be_trained_on(build):
    block = randomised(build()).eval().requires_grad_(False)
    x = torch.randn(1, 5, 6, 8, requires_grad=True)
    with torch.inference_mode():
        block(x)
        offsets = relative_offsets(103, 7, CPU)
    block(x).sum().backward()
    assert x.grad is not None
    assert not any(tensor.is_inference() for tensor in offsets)


def test_a_block_made_in_inference_mode(build):
    with torch.inference_mode():
        block = randomised(build()).eval()
        x = torch.randn(1, 5, 6, 8)
        first = block(x)
        block.log_cpb.fc2.weight.mul_(2)
        assert not torch.equal(block(x), first)
        assert_fresh(block, build, x)


def test_frozen_block_in_a_graph_of_gradients(build):
    """Frozen weights keep their bias although autograd runs, and the input still gets its gradient."""
    block = warm(build, torch.randn(1, 5, 6, 8)).requires_grad_(False)
    x = torch.randn(1, 5, 6, 8, requires_grad=True)
    frozen = torch.autograd.grad(block(x).sum(), x)[0]
    fresh = copy.deepcopy(block).requires_grad_(True)
    assert_near(frozen, torch.autograd.grad(fresh(x).sum(), x)[0])


def test_function_transforms(build):
    """torch.func needs the reference ops: an op registered with torch.library has no rule for it."""
    x = torch.randn(1, 4, 4, 8)
    block = warm(build, x)
    parameters = dict(block.named_parameters())

    def loss(parameters):
        return torch.func.functional_call(block, parameters, (x,)).square().sum()

    with backend("reference"):
        transformed = torch.func.grad(loss)(parameters)
        expected = torch.autograd.grad(loss(parameters), list(parameters.values()))
    for name, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(transformed[name], gradient, rtol=1e-4, atol=1e-4)
