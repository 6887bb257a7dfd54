"""Shared by the tests of blocks and models."""

import copy

import torch
from torch import Tensor, nn

GRIDS = [(1, 1), (1, 7), (7, 1), (5, 3), (2, 2), (8, 6), (9, 11)]  # cells, maps smaller than a window among them


def randomised(module: nn.Module, std: float = 0.3) -> nn.Module:
    """Draw every parameter anew, so that none is zero or the same for all heads. In place; returns the module."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=std)
    return module


def assert_near(actual: Tensor, expected: Tensor, tol: float = 1e-5) -> None:
    """Within ``tol`` of the largest magnitude; exact arithmetic in another order."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} != {tuple(expected.shape)}"
    assert actual.isfinite().all()
    error = (actual.to(expected.dtype) - expected).abs().max()
    assert error <= tol * expected.abs().max(), f"error {error:.2e} of {expected.abs().max():.2e}"


def gradcheck_module(module: nn.Module, x: Tensor) -> None:
    """Check the gradients of the input and of every parameter numerically, in float64."""
    module = copy.deepcopy(module).double()
    names, values = zip(*module.named_parameters(), strict=True)

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,))

    leaves = [value.detach().clone().requires_grad_() for value in (x.double(), *values)]
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
