"""ConvGLU from its weights, in slices of the batch where nobody differentiates."""

import pytest
import torch
import torch.nn.functional as F

from foveal.ops import backend, conv_glu, depthwise_gate
from tests.helpers import assert_near


def weights(channels=6, hidden=10, out=7, size=3, bias=True):
    biases = [torch.randn(n) if bias else None for n in (2 * hidden, hidden, out)]
    shapes = (2 * hidden, channels), (hidden, 1, size, size), (out, hidden)
    return [t for shape, b in zip(shapes, biases, strict=True) for t in (torch.randn(shape), b)]


def by_hand(x, weight1, bias1, conv_weight, conv_bias, weight2, bias2, act):
    return F.linear(depthwise_gate(F.linear(x, weight1, bias1), conv_weight, conv_bias, act), weight2, bias2)


@pytest.fixture
def rows(monkeypatch):
    """Slices of at most two images of 5 x 4 cells and 20 channels in float32; the batches that the layers see."""
    monkeypatch.setattr("foveal.ops._slices.SLICE_BYTES", 2 * 5 * 4 * 20 * 4 + 3)
    seen = []
    original = F.linear
    monkeypatch.setattr(F, "linear", lambda x, *args: seen.append(len(x)) or original(x, *args))
    return seen


@pytest.mark.parametrize("act", ["gelu", "silu"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [0, 1, 2, 5])
def test_slices_are_the_whole(batch, bias, act, rows):
    x, parameters = torch.randn(batch, 5, 4, 6), weights(bias=bias)
    expected = by_hand(x, *parameters, act)
    rows.clear()
    with torch.no_grad():
        ours = conv_glu(x, *parameters, act=act)
    assert max(rows) == min(batch, 2)
    assert ours.shape == expected.shape
    if batch:
        assert_near(ours, expected, tol=1e-5)


def test_one_image_is_the_smallest_slice(rows):
    with torch.no_grad():
        conv_glu(torch.randn(3, 5, 4, 6), *weights(hidden=40))
    assert set(rows) == {1}


def test_what_is_differentiated_is_not_sliced(rows):
    x, parameters = torch.randn(5, 5, 4, 6, requires_grad=True), weights()
    conv_glu(x, *parameters).sum().backward()
    assert set(rows) == {5}
    assert x.grad is not None


def test_both_backends_agree():
    x, parameters = torch.randn(3, 5, 4, 6), weights()
    with torch.no_grad():
        ours = conv_glu(x, *parameters)
        with backend("reference"):
            assert_near(ours, conv_glu(x, *parameters))


@pytest.mark.parametrize(
    ("index", "shape", "named"),
    [(0, (6,), "weight1"), (0, (19, 6), "weight1"), (0, (20, 5), "weight1"), (4, (7, 9), "weight2")],
)
def test_wrong_shapes_are_named(index, shape, named):
    parameters = weights()
    parameters[index] = torch.randn(shape)
    with pytest.raises(ValueError, match=named):
        conv_glu(torch.randn(1, 5, 4, 6), *parameters)
