"""Length-scaled cosine attention: global multi-head self-attention that keeps its entropy as the map grows."""

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from foveal.blocks._attention_weights import AttentionWeights
from foveal.blocks._checks import Grid, check_heads, check_map, check_probability, grid_of_map, to_grid
from foveal.blocks._initialization import init_linear
from foveal.blocks._module import MapModule
from foveal.blocks._temperature import init_temperature, temperature_scale
from foveal.blocks.log_cpb import LogCPB
from foveal.ops._checks import check_choice
from foveal.ops.dense_attention import dense_attention
from foveal.ops.reference import at_least_float32, unit


class LengthScaledCosineAttention(MapModule):
    """``softmax((q^ + QE) softplus(tau) log(N) k^T + B) v`` over all N = H * W cells (equation 9).

    Maps ``(B, H, W, C)`` to the same shape, at any H, W >= 1.

    Args:
        dim: channels C.
        num_heads: heads, a divisor of C.
        pretrain_grid: the grid (H, W) at pre-training, which normalises log-CPB's coordinates; None takes each input's.
        query_embedding: a learned embedding a head, added to the normalised queries.
        length_scaled: multiply the logits by log N.
        position_bias: "log-cpb" or None.
        qkv_bias: biases on queries, keys and values.
        attn_drop: dropout of the attention weights.
        proj_drop: dropout of the output.
        bias_resampling: "extrapolate" computes the bias for each input's grid; "interpolate" computes it for
            ``bias_grid`` and resamples it bilinearly.
        bias_grid: the declared grid of "interpolate".
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        pretrain_grid: int | Sequence[int] | None = None,
        query_embedding: bool = True,
        length_scaled: bool = True,
        position_bias: str | None = "log-cpb",
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        bias_resampling: str = "extrapolate",
        bias_grid: int | Sequence[int] | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_heads(dim, num_heads)
        check_probability("attn_drop", attn_drop)
        check_choice("position_bias", position_bias, ("log-cpb", None))
        check_choice("bias_resampling", bias_resampling, ("extrapolate", "interpolate"))
        dd = {"device": device, "dtype": dtype}
        self.dim = dim
        self.num_heads = num_heads
        self.length_scaled = length_scaled
        self.pretrain_grid = to_grid("pretrain_grid", pretrain_grid)
        self.bias_resampling = bias_resampling
        self.bias_grid = to_grid("bias_grid", bias_grid)
        if bias_resampling == "interpolate" and self.bias_grid is None:
            raise ValueError('bias_resampling="interpolate" needs bias_grid, the grid that the bias is made for')
        self.attn_drop = attn_drop
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.temperature = nn.Parameter(torch.empty(num_heads, **dd))
        self.query_embedding = nn.Parameter(torch.empty(num_heads, dim // num_heads, **dd)) if query_embedding else None
        self.log_cpb = LogCPB(num_heads, **dd) if position_bias == "log-cpb" else None
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init_linear(self.qkv)
        init_linear(self.proj)
        init_temperature(self.temperature)
        if self.query_embedding is not None:
            nn.init.trunc_normal_(self.query_embedding, std=0.02)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, pretrain_grid={self.pretrain_grid}"

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {"temperature"} | ({"query_embedding"} if self.query_embedding is not None else set())

    def forward(self, x: Tensor) -> Tensor:
        check_map(x, self.dim)
        grid = grid_of_map(x)
        q, k, v = self._heads(self.qkv(x))
        query, key = self._scaled(q, grid).to(v.dtype), unit(k).to(v.dtype)
        drop = self.attn_drop if self.training else 0.0
        x = dense_attention(query, key, v, self._bias(x, v.dtype), scale=1.0, dropout_p=drop)
        return self.proj_drop(self.proj(rearrange(x, "b n (h w) d -> b h w (n d)", h=grid[0])))

    def attention_weights(self, x: Tensor) -> AttentionWeights:
        """The weights that the values are multiplied with in ``forward(x)``, where they are never stored."""
        check_map(x, self.dim)
        grid = grid_of_map(x)
        q, k, _ = self._heads(self.qkv(x))
        logits = at_least_float32(self._scaled(q, grid).to(q.dtype)) @ unit(k).mT
        bias = self._bias(x, logits.dtype)
        weights = (logits if bias is None else logits + bias).softmax(dim=-1)
        pool = rearrange(weights, "b n (h w) (a c) -> b h w n a c", h=grid[0], a=grid[0])
        return AttentionWeights(None, pool, None)

    def _heads(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, each ``(B, heads, H * W, d)``."""
        return rearrange(x, "b h w (three n d) -> three b n (h w) d", three=3, n=self.num_heads).unbind(0)

    def _scaled(self, q: Tensor, grid: Grid) -> Tensor:
        """``(q^ + QE) softplus(tau) log(N)``, in at least float32."""
        scale = temperature_scale(self.temperature)[:, None, None]
        if self.length_scaled:
            scale = scale * scale.new_full((), grid[0] * grid[1]).log()
        query = unit(q)
        if self.query_embedding is not None:
            query = query + self.query_embedding[:, None]
        return query * scale

    def _bias(self, x: Tensor, dtype: torch.dtype) -> Tensor | None:
        if self.log_cpb is None:
            return None
        grid = grid_of_map(x)
        declared = grid if self.bias_resampling == "extrapolate" else self.bias_grid or grid
        bias = self.log_cpb(declared, declared, self.pretrain_grid or declared, like=x)
        return bias.interpolate(grid, grid).dense().to(dtype)[None]
