"""Pixel-focused attention: a sliding window and a pooled map compete in one softmax, as fovea and periphery do."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveal.blocks._attention_weights import AttentionWeights
from foveal.blocks._checks import Grid, check_heads, check_map, check_positive, check_probability, grid_of_map, to_grid
from foveal.blocks._initialization import init_linear
from foveal.blocks._module import MapModule
from foveal.blocks._plain import is_plain
from foveal.blocks._temperature import init_temperature, temperature_scale
from foveal.blocks.activate_and_pool import ActivateAndPool
from foveal.blocks.log_cpb import LogCPB, window_bias
from foveal.ops import PositionBias, aggregated_attention, attention_weights, reference
from foveal.ops._checks import check_choice, check_window_size


class PixelFocusedAttention(MapModule):
    """Attention of every cell to the window around it and to a pooled map (equations 1-5).

    Maps ``(B, H, W, C)`` to the same shape, at any H, W >= 1.

    Every ablation between this and :class:`AggregatedAttention` is a matter of its switches.

    Args:
        dim: channels C.
        num_heads: heads, a divisor of C.
        window_size: side k of the sliding window, odd. At the border the window is cut.
        pool_ratio: an H x W map is pooled to max(1, H // ratio) x max(1, W // ratio) cells.
        pool_grid: a fixed pooled grid (Hp, Wp), whatever the ratio (the paper's linear mode).
        pretrain_grid: the query grid (H, W) at pre-training, which normalises log-CPB's coordinates. None takes the
            grid of each input: fine alone, wrong for a model meant to extrapolate.
        qkv_bias: biases on queries, keys and values.
        attn_drop: dropout of the attention weights.
        proj_drop: dropout of the output.
        cosine: unit queries and keys, with a learned temperature a head, instead of the scale 1 / sqrt(d).
        length_scaled: multiply the logits by the log of the number of keys that the query sees.
        query_embedding: a learned embedding a head, added to the queries of the logits.
        positional_attention: add the query's products with learned tokens to the window's weights.
        window_bias: "learned" (a value per head and window cell), "log-cpb" (one MLP, shared with the pool) or None.
        pool_bias: "log-cpb", "learned" (a value per head and pooled cell, needs pool_grid) or None.
        bias_resampling: "extrapolate" computes the pooled log-CPB for each input's own grid; "interpolate" computes it
            for ``bias_grid`` and resamples it bilinearly.
        bias_grid: the declared query grid of "interpolate".
        act_layer: activation of the pool.
        norm_layer: norm of the pool.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window_size: int = 3,
        pool_ratio: int = 8,
        pool_grid: int | Sequence[int] | None = None,
        pretrain_grid: int | Sequence[int] | None = None,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        cosine: bool = False,
        length_scaled: bool = False,
        query_embedding: bool = False,
        positional_attention: bool = False,
        window_bias: str | None = "learned",
        pool_bias: str | None = "log-cpb",
        bias_resampling: str = "extrapolate",
        bias_grid: int | Sequence[int] | None = None,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_heads(dim, num_heads)
        check_window_size(window_size)
        check_positive("pool_ratio", pool_ratio)
        check_probability("attn_drop", attn_drop)
        check_choice("window_bias", window_bias, ("learned", "log-cpb", None))
        check_choice("pool_bias", pool_bias, ("log-cpb", "learned", None))
        check_choice("bias_resampling", bias_resampling, ("extrapolate", "interpolate"))
        dd = {"device": device, "dtype": dtype}
        self.dim = dim
        self.num_heads = num_heads
        self.window_size = window_size
        self.pool_ratio = pool_ratio
        self.pool_grid = to_grid("pool_grid", pool_grid)
        self.pretrain_grid = to_grid("pretrain_grid", pretrain_grid)
        self.bias_grid = to_grid("bias_grid", bias_grid)
        self.bias_resampling = bias_resampling
        self.attn_drop = attn_drop
        self.cosine = cosine
        self.length_scaled = length_scaled
        if bias_resampling == "interpolate" and self.bias_grid is None:
            raise ValueError('bias_resampling="interpolate" needs bias_grid, the query grid that the bias is made for')
        if pool_bias == "learned" and self.pool_grid is None:
            raise ValueError('pool_bias="learned" has a value per pooled cell and needs a fixed pool_grid, got None')

        head_dim, cells = dim // num_heads, window_size**2
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.pool = ActivateAndPool(dim, act_layer=act_layer, norm_layer=norm_layer, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

        def parameter(wanted: bool, *shape: int) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(shape, **dd)) if wanted else None

        self.temperature = parameter(cosine, num_heads)
        self.query_embedding = parameter(query_embedding, num_heads, head_dim)
        self.positional_tokens = parameter(positional_attention, num_heads, head_dim, cells)
        self.positional_bias = parameter(positional_attention, num_heads, cells)
        self.window_bias = parameter(window_bias == "learned", num_heads, cells)
        self.pool_bias = parameter(pool_bias == "learned", num_heads, *(self.pool_grid or ()))
        self.log_cpb = LogCPB(num_heads, **dd) if "log-cpb" in (window_bias, pool_bias) else None
        self._window_log_cpb, self._pool_log_cpb = window_bias == "log-cpb", pool_bias == "log-cpb"
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init_linear(self.qkv)
        init_linear(self.proj)
        if self.temperature is not None:
            init_temperature(self.temperature)
        for embedding in (self.query_embedding, self.positional_tokens, self.pool_bias):
            if embedding is not None:
                nn.init.trunc_normal_(embedding, std=0.02)
        if self.positional_bias is not None:
            nn.init.zeros_(self.positional_bias)
        if self.window_bias is not None:
            nn.init.trunc_normal_(self.window_bias, std=0.0004)

    def extra_repr(self) -> str:
        pool = f"pool_ratio={self.pool_ratio}" if self.pool_grid is None else f"pool_grid={self.pool_grid}"
        return (
            f"dim={self.dim}, num_heads={self.num_heads}, window_size={self.window_size}, {pool}, "
            f"pretrain_grid={self.pretrain_grid}"
        )

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        names = ("temperature", "query_embedding", "window_bias", "pool_bias")
        return {name for name in names if getattr(self, name) is not None}

    def key_grid(self, grid: Grid) -> Grid:
        """The pooled grid of a query grid."""
        return self.pool_grid or (max(1, grid[0] // self.pool_ratio), max(1, grid[1] // self.pool_ratio))

    def forward(self, x: Tensor) -> Tensor:
        check_map(x, self.dim)  # equations 1-4 and 10-14 are in ops.aggregated_attention, equation 5 in the pool
        q, k, v = self.heads(self.qkv(x), 3)
        k_pool, v_pool = self.heads(self.pooled_kv(self.pool(x, self.key_grid(grid_of_map(x)))), 2)
        drop = self.attn_drop if self.training else 0.0
        x = aggregated_attention(q, k, v, k_pool, v_pool, **self.terms(x), dropout_p=drop)
        return self.proj_drop(self.proj(x.flatten(3)))

    def attention_weights(self, x: Tensor) -> AttentionWeights:
        """The weights that the values are multiplied with in ``forward(x)``, where they are never stored."""
        check_map(x, self.dim)
        grid, cells = grid_of_map(x), (self.window_size, self.window_size)
        key_grid = self.key_grid(grid)
        q, k, _ = self.heads(self.qkv(x), 3)
        k_pool, _ = self.heads(self.pooled_kv(self.pool(x, key_grid)), 2)
        window, pool, positional = attention_weights(q, k, k_pool, **self.terms(x))
        if positional is not None:
            inside = reference.inside_map(grid, self.window_size, x.device)
            positional = (positional * inside[:, :, None]).unflatten(-1, cells)
        return AttentionWeights(window.unflatten(-1, cells), pool.unflatten(-1, key_grid), positional)

    def heads(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """The parts of a projection, each ``(B, H, W, heads, d)``."""
        return x.unflatten(-1, (parts, self.num_heads, self.dim // self.num_heads)).unbind(3)

    def pooled_kv(self, pooled: Tensor) -> Tensor:
        """Keys and values of the pooled map, ``(B, Hp, Wp, 2C)``: what the last two thirds of qkv's rows make of it."""
        if not is_plain(self.qkv, pooled):  # its call makes queries too, which nobody needs
            return self.qkv(pooled)[..., self.dim :]
        bias = None if self.qkv.bias is None else self.qkv.bias[self.dim :]
        return F.linear(pooled, self.qkv.weight[self.dim :], bias)

    def terms(self, x: Tensor) -> dict[str, Any]:
        """The op's arguments besides queries, keys and values."""
        return {
            "window_size": self.window_size,
            "scale": self._scale(x),
            "length_scaled": self.length_scaled,
            "normalize": self.cosine,
            "query_embedding": self.query_embedding,
            "window_bias": self._window_bias(x),
            "pool_bias": self._pool_bias(x),
            "positional_tokens": self.positional_tokens,
            "positional_bias": self.positional_bias,
        }

    def _scale(self, x: Tensor) -> Tensor:
        if self.temperature is not None:
            return temperature_scale(self.temperature)
        dtype = torch.promote_types(x.dtype, torch.float32)
        return x.new_full((self.num_heads,), 1 / math.sqrt(self.dim // self.num_heads), dtype=dtype)

    def _window_bias(self, x: Tensor) -> Tensor | None:
        if self.log_cpb is not None and self._window_log_cpb:
            return window_bias(self.log_cpb, self.window_size, self.pretrain_grid or grid_of_map(x), like=x)
        return self.window_bias

    def _pool_bias(self, x: Tensor) -> PositionBias | None:
        grid = grid_of_map(x)
        if self.pool_bias is not None:
            return PositionBias.per_key(self.pool_bias, grid)
        if self.log_cpb is None or not self._pool_log_cpb:
            return None
        if self.bias_resampling == "extrapolate":
            return self.log_cpb(grid, self.key_grid(grid), self.pretrain_grid or grid, like=x)
        declared = self.bias_grid or grid
        bias = self.log_cpb(declared, self.key_grid(declared), self.pretrain_grid or declared, like=x)
        return bias.interpolate(grid, self.key_grid(grid))
