"""Aggregated attention: pixel-focused attention with everything switched on."""

from collections.abc import Callable, Sequence

from torch import nn

from foveal.blocks.pixel_focused_attention import PixelFocusedAttention


class AggregatedAttention(PixelFocusedAttention):
    """Pixel-focused cosine attention with query embedding, positional attention and length scaling (equations 10-14).

    Maps ``(B, H, W, C)`` to the same shape, at any H, W >= 1. See :class:`PixelFocusedAttention` for the arguments.

    Example:
        >>> mixer = AggregatedAttention(96, num_heads=4, pool_ratio=4)
        >>> mixer(torch.randn(2, 20, 30, 96)).shape
        torch.Size([2, 20, 30, 96])
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
        query_embedding: bool = True,
        positional_attention: bool = True,
        length_scaled: bool = True,
        window_bias: str | None = "learned",
        pool_bias: str | None = "log-cpb",
        bias_resampling: str = "extrapolate",
        bias_grid: int | Sequence[int] | None = None,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        device=None,
        dtype=None,
    ):
        super().__init__(
            dim,
            num_heads,
            window_size=window_size,
            pool_ratio=pool_ratio,
            pool_grid=pool_grid,
            pretrain_grid=pretrain_grid,
            qkv_bias=qkv_bias,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            cosine=True,
            length_scaled=length_scaled,
            query_embedding=query_embedding,
            positional_attention=positional_attention,
            window_bias=window_bias,
            pool_bias=pool_bias,
            bias_resampling=bias_resampling,
            bias_grid=bias_grid,
            act_layer=act_layer,
            norm_layer=norm_layer,
            device=device,
            dtype=dtype,
        )
