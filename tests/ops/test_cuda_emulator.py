"""The emulator of CUDA itself: it computes what a GPU would, and it sees the mistakes that it says it sees."""

import pytest
import torch

from tests.ops.cuda_emulator import needs_emulator

pytestmark = needs_emulator


def probe(name, correct=True):
    x = torch.randn(64)
    return x, torch.ops.foveal_probes.probe(x, name, correct)


@pytest.mark.parametrize("name", ["reverse", "reverse_late"])
def test_barrier_and_what_its_lack_does(name):
    x, out = probe(name)
    assert out.equal(x.flip(0))
    assert any(probe(name, correct=False)[1].isnan().any() for _ in range(3))


def test_matrices_are_read_by_lanes_that_do_not_wait_for_others():
    x, out = probe("matrices")
    assert out.equal(x)
    assert probe("matrices", correct=False)[1].isnan().any()


def test_copies_arrive_when_they_are_waited_for():
    x, out = probe("copy")
    assert out.equal(x)
    assert probe("copy", correct=False)[1].isnan().all()


def test_waiting_for_ever_is_an_error():
    probe("half_barrier")
    with pytest.raises(RuntimeError, match="threads wait for others"):
        probe("half_barrier", correct=False)
    x, out = probe("reverse")  # and the next kernel runs
    assert out.equal(x.flip(0))


def test_shuffles_stay_in_the_warp():
    x, out = probe("sum_of_warp")
    torch.testing.assert_close(out, x.view(2, 32).sum(1).repeat_interleave(32))


@pytest.mark.parametrize("in_two", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_of_a_warp(dtype, in_two):
    a, b = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype)
    torch.testing.assert_close(torch.ops.foveal_probes.warp_product(a, b, in_two), a.float() @ b.float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_round_as_in_torch(dtype):
    special = torch.tensor([0.0, -0.0, 1e-8, -3e-8, 6e-5, 65504.0, 65519.0, 65520.0, -1e30, float("inf"), 3e-39])
    x = torch.cat([special, torch.randn(512) * 10 ** torch.randint(-9, 5, (512,)), torch.zeros(117)])
    assert torch.ops.foveal_probes.round_to(x, torch.empty(0, dtype=dtype)).equal(x.to(dtype))
    half = torch.arange(1 << 16).to(torch.uint16).view(dtype)
    half = half[half.isfinite()][: 1 << 15]
    assert torch.ops.foveal_probes.round_to(half.float(), torch.empty(0, dtype=dtype)).equal(half)
