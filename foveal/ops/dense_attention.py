"""Scaled dot-product attention among all cells of a map: PyTorch's own, where it can be differentiated as asked."""

import torch
import torch.nn.functional as F
from torch import Tensor

from foveal.ops import reference
from foveal.ops.backend import circumstances


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, *, scale: float | None = None, dropout_p: float = 0.0
) -> Tensor:
    """``softmax(scale * q @ k.transpose(-2, -1) + bias) @ v``.

    Equivalent to ``F.scaled_dot_product_attention``, whose fused kernels support neither second derivatives nor
    ``torch.func``, and are unknown to counters of operations. On the CPU the plain products are taken where gradients
    are wanted; PyTorch takes them there anyway when the bias needs a gradient.

    Args:
        q: ``(B, heads, N, d)``.
        k, v: ``(B, heads, M, d)``.
        bias: ``(1 or B, heads, N, M)``, added to the logits.
        scale: of the logits; None means ``1 / sqrt(d)``.
        dropout_p: probability with which a weight is dropped.
    """
    differentiated = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k, v, bias))
    eager = not torch.compiler.is_compiling()
    by_products = eager and ((q.device.type == "cpu" and differentiated) or torch._C._len_torch_dispatch_stack() > 0)
    if not torch.compiler._is_exporting_flag and (by_products or circumstances(q)):
        return reference.dense_attention(q, k, v, bias, scale, dropout_p)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout_p, scale=scale)
    # Strides differ from kernel to kernel, and an exported view must hold for all.
    return out.clone(memory_format=torch.contiguous_format) if torch.compiler._is_exporting_flag else out
