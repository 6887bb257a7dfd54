"""Attention among all cells: PyTorch's own and the plain products agree, in every precision."""

import pytest
import torch
import torch.nn.functional as F

from foveal.ops.dense_attention import dense_attention


def draw(dtype, requires_grad):
    q, k, v = (torch.randn(2, 3, n, 8, dtype=dtype, requires_grad=requires_grad) for n in (5, 7, 7))
    return q, k, v, torch.randn(1, 3, 5, 7, dtype=dtype)


@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_equal_pytorchs_own(dtype, biased, scale):
    q, k, v, bias = draw(dtype, True)
    bias = bias if biased else None
    out = dense_attention(q, k, v, bias, scale=scale)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    torch.testing.assert_close(out, expected)
    with torch.no_grad():
        torch.testing.assert_close(dense_attention(q, k, v, bias, scale=scale), expected)


@pytest.mark.parametrize("autocast", [True, False])
def test_half_types_have_a_softmax_in_float32(autocast):
    """Logits of a few hundred, whose differences bfloat16 would round away."""
    q, k, v, bias = draw(torch.bfloat16, True)
    q = (q.detach() * 40).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = dense_attention(q, k, v, bias, scale=1.0)
    assert out.dtype == torch.bfloat16
    exact = dense_attention(*(x.double() for x in (q, k, v, bias)), scale=1.0)
    assert (out.double() - exact).abs().max() < 2**-7 * exact.abs().max()


def test_dropout_drops():
    q, k, v, bias = draw(torch.float64, True)
    torch.manual_seed(0)
    dropped = torch.stack([dense_attention(q, k, v, bias, dropout_p=0.3) for _ in range(3000)]).mean(0)
    assert (dropped - dense_attention(q, k, v, bias)).abs().max() < 0.15
