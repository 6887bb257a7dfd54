"""The CUDA kernels on the host: tiling, reductions and indices. A GPU runs the ops' own tests instead."""

import pytest
import torch

from foveal import ops
from tests.ops import test_pool as pool
from tests.ops.cuda_emulator import emulated, needs_emulator
from tests.ops.helpers import assert_as_accurate, poisoned_memory

pytestmark = needs_emulator
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def assert_emulated_is_accurate(function, inputs, kernels):
    with poisoned_memory():
        ran = assert_as_accurate(function, inputs, emulated)
    assert ran == kernels


POOL = {"activate_and_pool", "activate_and_pool_backward"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "grid"), pool.CASES, ids=str)
def test_pool(shape, grid, dtype):
    assert_emulated_is_accurate(pool.pool(grid), [pool.tokens(shape, dtype)], POOL)


@pytest.mark.parametrize("act", pool.ACTS)
def test_pool_activations(act):
    assert_emulated_is_accurate(pool.pool((2, 3), act), [pool.tokens((2, 5, 6, 20), torch.float16)], POOL)


@pytest.mark.parametrize("view", [lambda x: x[:, ::2, 1:, 3:23], lambda x: x.transpose(1, 2), lambda x: x[..., ::3]])
def test_pool_strided(view):
    x = pool.tokens((2, 6, 7, 30))
    assert_emulated_is_accurate(lambda x: ops.activate_and_pool(view(x), (2, 3)), [x], POOL)
