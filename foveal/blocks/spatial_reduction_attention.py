"""Spatial-reduction attention: PVTv2's global attention to a strided convolution of the map, the paper's baseline."""

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from foveal.blocks._attention_weights import AttentionWeights
from foveal.blocks._checks import check_heads, check_map, check_positive, check_probability, grid_of_map
from foveal.blocks._convolution import convolve
from foveal.blocks._initialization import init_convolution, init_linear
from foveal.blocks._module import MapModule
from foveal.ops.dense_attention import dense_attention
from foveal.ops.reference import at_least_float32


class SpatialReductionAttention(MapModule):
    """Scaled dot-product attention to a reduced map, ``(B, H, W, C)`` to the same shape (PVTv2, arXiv 2106.13797).

    Keys and values come from ``norm(conv(x))``, a convolution whose kernel and stride are the ratio. A side shorter
    than the ratio is padded with zeros to one cell. With a ratio of 1 there is neither convolution nor norm.

    Args:
        dim: channels C.
        num_heads: heads, a divisor of C.
        sr_ratio: spatial reduction ratio of keys and values.
        qkv_bias: biases on queries, keys and values.
        attn_drop: dropout of the attention weights.
        proj_drop: dropout of the output.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        sr_ratio: int = 1,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_heads(dim, num_heads)
        check_positive("sr_ratio", sr_ratio)
        check_probability("attn_drop", attn_drop)
        dd = {"device": device, "dtype": dtype}
        self.dim = dim
        self.num_heads = num_heads
        self.sr_ratio = sr_ratio
        self.attn_drop = attn_drop
        self.q = nn.Linear(dim, dim, bias=qkv_bias, **dd)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias, **dd)
        self.sr = nn.Conv2d(dim, dim, sr_ratio, stride=sr_ratio, **dd) if sr_ratio > 1 else None
        self.norm = nn.LayerNorm(dim, **dd) if sr_ratio > 1 else None
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for linear in (self.q, self.kv, self.proj):
            init_linear(linear)
        if self.sr is not None:
            init_convolution(self.sr)

    def forward(self, x: Tensor) -> Tensor:
        check_map(x, self.dim)
        grid = grid_of_map(x)
        q, k, v = self._heads(x, self._reduce(x))
        x = dense_attention(q, k, v, dropout_p=self.attn_drop if self.training else 0.0)
        return self.proj_drop(self.proj(rearrange(x, "b n (h w) d -> b h w (n d)", h=grid[0])))

    def attention_weights(self, x: Tensor) -> AttentionWeights:
        """The weights that the values are multiplied with in ``forward(x)``, where they are never stored."""
        check_map(x, self.dim)
        reduced = self._reduce(x)
        q, k, _ = map(at_least_float32, self._heads(x, reduced))
        weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(dim=-1)
        pool = rearrange(weights, "b n (h w) (a c) -> b h w n a c", h=grid_of_map(x)[0], a=grid_of_map(reduced)[0])
        return AttentionWeights(None, pool, None)

    def _heads(self, x: Tensor, reduced: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries ``(B, heads, H * W, d)`` of a map, keys and values of the reduced one."""
        q = rearrange(self.q(x), "b h w (n d) -> b n (h w) d", n=self.num_heads)
        k, v = rearrange(self.kv(reduced), "b h w (two n d) -> two b n (h w) d", two=2, n=self.num_heads).unbind(0)
        return q, k, v

    def _reduce(self, x: Tensor) -> Tensor:
        if self.sr is None or self.norm is None:
            return x
        missing_rows, missing_columns = (max(0, self.sr_ratio - side) for side in grid_of_map(x))
        x = F.pad(x, (0, 0, 0, missing_columns, 0, missing_rows))
        return self.norm(convolve(self.sr, x))
