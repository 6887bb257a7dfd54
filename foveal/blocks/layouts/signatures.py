"""Blocks behind the signatures by which timm's constructors call their parts.

A block is given as a factory, ``dim -> nn.Module``, which gets those of timm's arguments that its signature names and
that no ``functools.partial`` has fixed.
"""

import copyreg
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn

from foveal.blocks._factory import call
from foveal.blocks.conv_glu import ConvGLU
from foveal.blocks.layouts.channels_first import ChannelsFirst
from foveal.blocks.layouts.grid import HasGrid
from foveal.blocks.layouts.tokens import TokenMixer, Tokens

Factory = Callable[..., nn.Module]


def mlp_layer(
    block: Factory = ConvGLU, *, grid: int | Sequence[int] | HasGrid, num_prefix_tokens: int = 0
) -> Callable[..., Tokens]:
    """An ``mlp_layer`` for timm's ViTs: a gated block over tokens, of the size of the MLP that it replaces.

    The block is offered hidden_dim, two thirds of timm's ``hidden_features``, out_dim, act_layer and drop.

    Args:
        block: ConvGLU, or another factory of a block.
        grid: the grid (H, W) of the tokens, as of :class:`Tokens`.
        num_prefix_tokens: class and register tokens before the cells.

    Example:
        >>> layer = mlp_layer(ConvGLU, grid=14, num_prefix_tokens=1)
        >>> timm.create_model("vit_small_patch16_224", mlp_layer=layer)
    """
    return partial(_mlp, block, grid, num_prefix_tokens)


def _mlp(
    block: Factory,
    grid: int | Sequence[int] | HasGrid,
    num_prefix_tokens: int,
    in_features: int,
    hidden_features: int | None = None,
    out_features: int | None = None,
    act_layer: Callable[[], nn.Module] = nn.GELU,
    norm_layer: Factory | None = None,
    bias: bool = True,
    drop: float = 0.0,
    device=None,
    dtype=None,
) -> Tokens:
    if norm_layer is not None or not bias:
        raise ValueError(
            "norm_layer must be None and bias True, as blocks have biases and no inner norm (a ViT with "
            f"scale_mlp_norm=False and proj_bias=True), got {norm_layer} and {bias}"
        )
    offered = {
        "hidden_dim": int((hidden_features or in_features) * 2 / 3),
        "out_dim": out_features,
        "act_layer": act_layer,
        "drop": drop,
        "device": device,
        "dtype": dtype,
    }
    return Tokens(call(block, in_features, offered=offered, where="mlp_layer"), grid, num_prefix_tokens)


class _FactoryClass(type):
    """A class in name only, for constructors that ask issubclass() of what they call: calling it calls ``make``."""

    make: Callable[..., nn.Module]

    def __new__(mcs, make: Callable[..., nn.Module]) -> type:
        return super().__new__(mcs, "FactoryClass", (), {"make": staticmethod(make)})

    def __init__(cls, make: Callable[..., nn.Module]):
        super().__init__("FactoryClass", (), {})

    def __call__(cls, *args: Any, **kwargs: Any) -> nn.Module:
        return cls.make(*args, **kwargs)


copyreg.pickle(_FactoryClass, lambda cls: (_FactoryClass, (cls.make,)))  # timm's models keep their arguments


def token_mixer(block: Factory, *, head_dim: int | None = None) -> type:
    """A ``token_mixers`` for timm's MetaFormer and InceptionNeXt: a block over ``(B, C, H, W)``.

    Args:
        block: a factory of a mixer, offered num_heads (with ``head_dim``) and proj_drop.
        head_dim: channels of a head, for stages of different widths.

    Example:
        >>> mixer = token_mixer(partial(AggregatedAttention, pool_ratio=4), head_dim=32)
        >>> timm.create_model("poolformerv2_s12", token_mixers=mixer)
    """
    return _FactoryClass(partial(_mixer, block, head_dim))


def _mixer(
    block: Factory,
    head_dim: int | None,
    dim: int,
    *,
    proj_drop: float = 0.0,
    dilation: int = 1,
    device=None,
    dtype=None,
) -> ChannelsFirst:
    if dilation != 1:
        raise ValueError(f"dilation must be 1, as blocks have none (output_stride=32), got {dilation}")
    offered = {"proj_drop": proj_drop, "device": device, "dtype": dtype, **_heads(dim, head_dim)}
    return ChannelsFirst(call(block, dim, offered=offered, where="token_mixer"))


def attn_layer(block: Factory, *, grid: int | Sequence[int] | HasGrid) -> type:
    """An ``attn_layer`` for timm's ViTs without prefix tokens: a mixer over the map of the tokens.

    Args:
        block: a factory of a mixer, offered num_heads, qkv_bias, attn_drop and proj_drop.
        grid: the grid (H, W) of the tokens, as of :class:`Tokens`.

    Example:
        >>> layer = attn_layer(partial(AggregatedAttention, pool_ratio=2), grid=14)
        >>> timm.create_model("vit_small_patch16_224", attn_layer=layer, class_token=False, global_pool="avg")
    """
    return _FactoryClass(partial(_attention, block, grid))


def _attention(
    block: Factory,
    grid: int | Sequence[int] | HasGrid,
    dim: int,
    num_heads: int,
    qkv_bias: bool = False,
    qk_norm: bool = False,
    scale_norm: bool = False,
    proj_bias: bool = True,
    attn_drop: float = 0.0,
    proj_drop: float = 0.0,
    norm_layer: Factory | None = None,  # of qk_norm and scale_norm
    depth: int = 0,  # of attention whose initialisation depends on it
    device=None,
    dtype=None,
) -> TokenMixer:
    if qk_norm or scale_norm or not proj_bias:
        raise ValueError(
            "qk_norm and scale_norm must be False and proj_bias True, as blocks bring their own norms and biases, "
            f"got {qk_norm}, {scale_norm} and {proj_bias}"
        )
    offered = {
        "num_heads": num_heads,
        "qkv_bias": qkv_bias,
        "attn_drop": attn_drop,
        "proj_drop": proj_drop,
        "device": device,
        "dtype": dtype,
    }
    return TokenMixer(call(block, dim, offered=offered, where="attn_layer"), grid)


def _heads(dim: int, head_dim: int | None) -> dict[str, int]:
    if head_dim is None:
        return {}
    if head_dim < 1 or dim % head_dim:
        raise ValueError(f"head_dim must divide the width {dim}, got {head_dim}")
    return {"num_heads": dim // head_dim}
