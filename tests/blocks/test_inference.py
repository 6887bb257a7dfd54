"""Inference on the CPU in slices of the batch gives what the whole batch gives."""

import copy

import pytest
import torch
from torch import nn

from foveal.blocks import GLU, ConvGLU, ConvGLUType1, ConvGLUType2, ConvGLUType3, inference
from tests.helpers import assert_near, randomised


@pytest.fixture
def rows(monkeypatch):
    """Slices of at most two images of 5 x 4 cells and 20 channels in float32; the sizes that fc2 sees."""
    monkeypatch.setattr(inference, "SLICE_BYTES", 2 * 5 * 4 * 20 * 4 + 3)
    seen = []
    original = nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda x, *args: seen.append(len(x)) or original(x, *args))
    return seen


@pytest.mark.parametrize("layer", [GLU, ConvGLU, ConvGLUType1, ConvGLUType2, ConvGLUType3])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_slices_are_the_whole(layer, batch, rows):
    block = randomised(layer(6, 10, 7)).eval()
    x = torch.randn(batch, 5, 4, 6)
    whole = block(x).detach()
    assert set(rows) == {batch}
    rows.clear()
    with torch.inference_mode():
        assert_near(block(x), whole, tol=1e-6)
    assert max(rows) == min(batch, 2)


def test_one_image_is_the_smallest_slice(rows):
    block, x = ConvGLU(6, 40).eval(), torch.randn(3, 5, 4, 6)
    with torch.no_grad():
        block(x)
    assert set(rows) == {1}


def test_training_is_not_sliced(rows):
    block, x = ConvGLU(6, 10), torch.randn(5, 5, 4, 6)
    with torch.no_grad():
        block(x)
    assert set(rows) == {5}


@pytest.mark.parametrize("name", ["fc1", "act", "dwconv", "fc2"])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_hook_sees_the_whole_batch(name, kind, rows):
    block, x, seen = randomised(ConvGLU(6, 10)).eval(), torch.randn(5, 5, 4, 6), []
    expected = copy.deepcopy(block)(x).detach()
    getattr(getattr(block, name), kind)(lambda module, args, *out: seen.append(len(args[0])))
    with torch.no_grad():
        assert_near(block(x), expected, tol=1e-6)
    # The op holds activation and convolution itself; their hooks are silent, as they are in training.
    assert seen == ([5] if name in ("fc1", "fc2") else [])
    assert set(rows) == {5}


@pytest.mark.parametrize("bias", [True, False])
def test_first_layer_without_its_bias_term(bias):
    block = randomised(ConvGLU(6, 10)).eval()
    if not bias:
        block.fc1.bias = None
    x = torch.randn(2, 5, 4, 6)
    expected = block(x).detach()
    with torch.inference_mode():
        assert_near(block(x), expected, tol=1e-6)


def test_adapted_layers_are_called():
    """LoRA, quantisation and the like replace fc1; its weight alone would miss what they add."""

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    block, x = randomised(ConvGLU(6, 10)).eval(), torch.randn(2, 5, 4, 6)
    block.fc1.__class__ = Doubled
    expected = block(x).detach()
    with torch.inference_mode():
        assert_near(block(x), expected, tol=1e-6)
