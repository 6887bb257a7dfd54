"""Whole models on a GPU compute what they compute on the CPU."""

import copy

import pytest
import timm
import torch

import foveal  # noqa: F401 - registers the models
from tests.helpers import assert_near

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def outputs_and_gradients(model, x):
    out = model(x)
    gradients = torch.autograd.grad(out.square().sum(), list(model.parameters()))
    return out.detach().cpu(), [gradient.cpu() for gradient in gradients]


def test_outputs_and_gradients():
    model = timm.create_model("transnext_pico", num_classes=10).train()
    x = torch.randn(2, 3, 96, 64)
    out, gradients = outputs_and_gradients(model, x)
    with torch.backends.cudnn.flags(allow_tf32=False):
        on_gpu, gpu_gradients = outputs_and_gradients(copy.deepcopy(model).cuda(), x.cuda())
    assert_near(on_gpu, out, 1e-4)
    largest = max(gradient.abs().max() for gradient in gradients)
    for ours, theirs in zip(gpu_gradients, gradients, strict=True):
        assert (ours - theirs).abs().max() <= 1e-3 * max(theirs.abs().max(), 1e-3 * largest)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_training_step_under_autocast_and_compiled(dtype):
    model = timm.create_model("transnext_pico", num_classes=10).cuda().train()
    x = torch.randn(2, 3, 64, 64, device="cuda")
    for run in (model, torch.compile(model)):
        with torch.autocast("cuda", dtype):
            out = run(x)
        model.zero_grad()
        out.float().square().sum().backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
