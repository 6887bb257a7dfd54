"""Blocks and models under higher derivatives and the transforms of torch.func."""

import pytest
import torch
from torch.func import functional_call, grad, jacrev, jvp, vmap

from foveal.blocks import AggregatedAttention, ConvGLU, LengthScaledCosineAttention
from foveal.models import transnext
from foveal.ops import backend
from tests.helpers import assert_near, randomised

BLOCKS = {
    "AggregatedAttention": lambda: AggregatedAttention(8, 2, pool_ratio=2),
    "LengthScaledCosineAttention": lambda: LengthScaledCosineAttention(8, 2),
    "LengthScaledCosineAttention without bias": lambda: LengthScaledCosineAttention(8, 2, position_bias=None),
    "ConvGLU": lambda: ConvGLU(8),
}


def net():
    model = transnext((8, 16), (1, 1), (1, 2), (4, 4), (2, None), pretrain_size=32, num_classes=3)
    return randomised(model, 0.2).double().eval()


@pytest.fixture(params=BLOCKS.values(), ids=BLOCKS)
def block(request):
    return randomised(request.param()).double().eval()


@pytest.mark.parametrize("frozen", [False, True])
def test_a_hessian_is_the_derivative_of_the_gradient(block, frozen):
    block.requires_grad_(not frozen)
    x, v = (torch.randn(1, 3, 4, 8, dtype=torch.float64) for _ in range(2))

    def gradient(x):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(block(x).square().sum(), x)[0]

    hessian = torch.autograd.functional.hessian(lambda x: block(x).square().sum(), x).reshape(x.numel(), x.numel())
    expected = (gradient(x + 1e-6 * v) - gradient(x - 1e-6 * v)) / 2e-6
    assert_near(hessian @ v.flatten(), expected.flatten(), tol=1e-6)


def test_a_gradient_penalty_trains_every_parameter_as_the_definitions_do():
    model, x = net(), torch.randn(2, 3, 32, 32, dtype=torch.float64, requires_grad=True)

    def penalty():
        (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        parameters = list(model.parameters())
        return torch.autograd.grad(gradient.square().sum(), parameters, materialize_grads=True)

    ours = penalty()
    with backend("reference"):
        expected = penalty()
    largest = max(g.abs().max() for g in expected)
    assert largest > 0
    for mine, theirs in zip(ours, expected, strict=True):
        assert (mine - theirs).abs().max() < 1e-8 * largest


def test_jacobians_and_batches_of_a_model():
    model, x = net(), torch.randn(3, 3, 32, 32, dtype=torch.float64)
    expected = model(x).detach()
    assert_near(vmap(lambda image: model(image[None])[0])(x).detach(), expected, tol=1e-9)
    jacobian = jacrev(model)(x[:1]).detach()
    leaf = x[:1].clone().requires_grad_()
    for c in range(3):
        assert_near(jacobian[0, c], torch.autograd.grad(model(leaf)[0, c], leaf)[0], tol=1e-9)


def test_forward_derivatives_of_a_model():
    model, x = net(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    v = torch.randn_like(x)
    _, tangent = jvp(model, (x,), (v,))
    with torch.no_grad():
        expected = (model(x + 1e-6 * v) - model(x - 1e-6 * v)) / 2e-6
        with torch.autograd.forward_ad.dual_level():
            dual = model(torch.autograd.forward_ad.make_dual(x, v))
            assert_near(torch.autograd.forward_ad.unpack_dual(dual).tangent, expected, tol=1e-6)
    assert_near(tangent.detach(), expected, tol=1e-6)


def test_gradients_of_each_sample():
    model, x = net(), torch.randn(3, 3, 32, 32, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, image):
        return functional_call(model, parameters, (image[None],)).square().sum()

    each = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    model(x).square().sum().backward()
    largest = max(p.grad.abs().max() for p in model.parameters())
    for name, p in model.named_parameters():
        assert (each[name].sum(0) - p.grad).abs().max() < 1e-8 * largest


def test_a_black_or_padded_image_has_finite_gradients():
    """At initialisation, where biases are zero, its queries and keys have no direction."""
    model = transnext((8, 16), (1, 1), (1, 2), (4, 4), (2, None), pretrain_size=32, num_classes=3)
    x = torch.zeros(2, 3, 32, 64)
    x[:, :, :, :32] = torch.randn(2, 3, 32, 32)
    x[1] = 0
    x.requires_grad_()
    model(x).square().sum().backward()
    # A LayerNorm passes up to 1 / sqrt(eps) = 1e3; a vector divided by 1e-12 would pass 1e12.
    assert max(p.grad.abs().max() for p in model.parameters()) < 1e7
    assert x.grad.abs().max() < 1e7
