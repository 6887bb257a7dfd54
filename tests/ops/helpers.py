"""What the tests of compiled ops share: running an op by both backends, error bounds, poisoned memory."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from foveal.ops import backend

# Of which a device's kernels serve some: a test over them runs with those (conftest.py).
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
# Added to the bound on an error, relative to the largest magnitude or 1: a few roundings of the coarser of the result's
# type and the type it is computed in.
SLACK = {torch.float64: 2**-46, torch.float32: 2**-21, torch.float16: 2**-12, torch.bfloat16: 2**-9}
# No error may exceed this, whatever plain PyTorch makes of it.
CAP = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
# The largest error of a gradient with two elements is by chance a third of what it is next time: several upstream
# gradients tell how much an implementation errs.
DRAWS = 4

on_devices = pytest.mark.on_devices  # see conftest.py
needs_compiler = pytest.mark.usefixtures("cpu_kernels")  # of tests/conftest.py


def results(
    function: Callable,
    inputs: Sequence[Tensor | None],
    name: str,
    grad_dtype: torch.dtype | None = None,
    draws: int = 1,
) -> list[Tensor]:
    """The output of ``function(*inputs)`` by a backend, then the gradients of every input that requires one.

    The upstream gradients are random, the same at every call, and rounded to ``grad_dtype`` (that of the output). Of
    several draws, an input's gradients are stacked.
    """
    wanted = [x for x in inputs if x is not None and x.requires_grad]
    with backend(name):
        out = function(*inputs)
    if not wanted:
        return [out]
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(draws, *out.shape, generator=generator, dtype=torch.float64, device="cpu")
    upstream = upstream.to(grad_dtype or out.dtype).to(out)
    grads = [torch.autograd.grad(out, wanted, grad, retain_graph=True) for grad in upstream]
    return [out.detach(), *(grads[0] if draws == 1 else map(torch.stack, zip(*grads, strict=True)))]


def as_float64(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().double().requires_grad_(x.requires_grad)


def assert_as_accurate(
    function: Callable, inputs: Sequence[Tensor | None], running: Callable[[], AbstractContextManager] = nullcontext
) -> Any:
    """Compiled output and gradients err by at most twice what the reference errs, both against float64.

    The compiled op runs within ``running()``, whose value is returned.
    """
    with running() as context:
        compiled = results(function, inputs, "compiled", draws=DRAWS)
    plain = results(function, inputs, "reference", draws=DRAWS)
    dtype = compiled[0].dtype
    exact = results(function, [as_float64(x) for x in inputs], "reference", dtype, DRAWS)
    for index, (ours, theirs, truth) in enumerate(zip(compiled, plain, exact, strict=True)):
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
        if truth.numel() == 0:
            continue
        coarser = max(ours.dtype, torch.promote_types(dtype, torch.float32), key=SLACK.__getitem__)
        scale = truth.abs().max().clamp(min=1)
        error, bound = ((x.double() - truth).abs().max() for x in (ours, theirs))
        assert error <= 2 * bound + SLACK[coarser] * scale, f"result {index}: {error:.2e}, reference {bound:.2e}"
        assert error <= CAP[coarser] * scale, f"result {index}: {error:.2e} of {scale:.2e}"
    return context


@contextmanager
def poisoned_memory():
    """Tensors allocated without a value are full of NaN, inside an op's kernel too."""
    # On a GPU some of the reference has no deterministic implementation, and only warns.
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        assert torch.empty(8).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)
