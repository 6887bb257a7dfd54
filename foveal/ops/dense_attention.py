"""Scaled dot-product attention among all cells of a map: PyTorch's own, where it can be differentiated as asked."""

import torch
import torch.nn.functional as F
from torch import Tensor

from foveal.ops.backend import circumstances


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, *, scale: float | None = None, dropout_p: float = 0.0
) -> Tensor:
    """``softmax(scale * q @ k.mT + bias) @ v``.

    Equivalent to ``F.scaled_dot_product_attention``, whose fused kernels know neither second derivatives nor the
    transforms of ``torch.func``, and which counters of operations do not know. On the CPU the products are written out
    wherever the result is differentiated; a bias that learns leaves PyTorch no other way there either.

    Args:
        q: ``(B, heads, N, d)``.
        k, v: ``(B, heads, M, d)``.
        bias: ``(1 or B, heads, N, M)``, added to the logits.
        scale: of the logits; None means ``1 / sqrt(d)``.
        dropout_p: probability with which a weight is dropped.
    """
    differentiated = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k, v, bias))
    by_products = differentiated and q.device.type == "cpu" and not torch.compiler.is_compiling()
    if by_products or (circumstances(q) and not torch.compiler._is_exporting_flag):
        logits = q * (q.shape[-1] ** -0.5 if scale is None else scale) @ k.mT
        weights = (logits if bias is None else logits + bias).softmax(dim=-1)
        return F.dropout(weights, dropout_p) @ v
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout_p, scale=scale)
    # Strides differ from kernel to kernel, and an exported view must hold for all.
    return out.clone(memory_format=torch.contiguous_format) if torch.compiler._is_exporting_flag else out
