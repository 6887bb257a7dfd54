"""FlexAttention as a contender computes what the op is defined as. On the CPU it has no backward."""

import pytest
import torch

from benchmarks import operations
from foveal import ops

STAGE = operations.StageShape("small", (5, 6), 2, 8, (2, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_output(dtype):
    attention = operations.operations(STAGE, 2, dtype, "cpu", training=False)[-1]
    with ops.backend("reference"):
        expected, out = attention.call(), attention.by_flex()()
    assert out.dtype == expected.dtype
    # The scaled query and the weights are rounded once more than in the definition.
    bound = 8 * torch.finfo(dtype).eps * expected.abs().max()
    assert (out - expected).abs().max() <= bound
