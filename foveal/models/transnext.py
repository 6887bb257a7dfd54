"""TransNeXt (arXiv 2311.17132) as data: a configuration of foveal's blocks, registered in timm."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import generate_default_cfgs, register_model
from torch import nn

from foveal.blocks import AggregatedAttention, ConvGLU, LengthScaledCosineAttention
from foveal.models.backbone import Backbone
from foveal.models.in_timm import LAYOUT, timm_model
from foveal.models.stage import Stage

__all__ = ["transnext"]  # timm adds every registered entry point below


def transnext(
    dims: Sequence[int],
    depths: Sequence[int],
    num_heads: Sequence[int],
    mlp_ratios: Sequence[float],
    pool_ratios: Sequence[int | None],
    *,
    window_size: int = 3,
    img_size: int | tuple[int, int] = 224,
    pretrain_size: int | tuple[int, int] = 224,
    pool_grid: int | tuple[int, int] | None = None,
    bias_resampling: str = "extrapolate",
    in_chans: int = 3,
    num_classes: int = 1000,
    global_pool: str = "avg",
    drop_rate: float = 0.0,
    proj_drop_rate: float = 0.0,
    attn_drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    norm_layer: Callable[..., nn.Module] | None = None,
    act_layer: Callable[[], nn.Module] = nn.GELU,
    device=None,
    dtype=None,
) -> Backbone:
    """Assemble a TransNeXt: aggregated attention (or global attention) and ConvGLU in every block.

    Args:
        dims: channels of each stage.
        depths: blocks of each stage.
        num_heads: heads of each stage.
        mlp_ratios: ratio of each stage's MLP; ConvGLU's hidden width is int(dim * ratio * 2 / 3), which keeps the size.
        pool_ratios: pooling of each stage's aggregated attention; None or 1 makes its mixer global cosine attention.
        window_size: side of the sliding window, odd.
        img_size: image size that the interpolated bias is made for; extrapolation needs none.
        pretrain_size: image size at pre-training, which normalises the position bias.
        pool_grid: a fixed pooled grid instead of the ratios, the paper's linear mode.
        bias_resampling: "extrapolate" or "interpolate".
        act_layer: activation of the pools and gates.

    The other arguments are :class:`Backbone`'s.
    """
    per_stage = {"depths": depths, "num_heads": num_heads, "mlp_ratios": mlp_ratios, "pool_ratios": pool_ratios}
    for name, values in per_stage.items():
        if len(values) != len(dims):
            raise ValueError(f"{name} must have one value a stage, {len(dims)} as dims, got {len(values)}")

    def mixer(heads: int, pool_ratio: int | None) -> Callable[..., nn.Module]:
        if pool_ratio in (None, 1):
            return partial(LengthScaledCosineAttention, num_heads=heads, bias_resampling=bias_resampling)
        return partial(
            AggregatedAttention,
            num_heads=heads,
            window_size=window_size,
            pool_ratio=pool_ratio,
            pool_grid=pool_grid,
            bias_resampling=bias_resampling,
            act_layer=act_layer,
        )

    stages = [
        Stage(
            dim=dim,
            depth=depth,
            mixer=mixer(heads, pool_ratio),
            mlp=partial(ConvGLU, hidden_dim=int(dim * mlp_ratio * 2 / 3), act_layer=act_layer),
        )
        for dim, depth, heads, mlp_ratio, pool_ratio in zip(
            dims, depths, num_heads, mlp_ratios, pool_ratios, strict=True
        )
    ]
    return Backbone(
        stages,
        in_chans=in_chans,
        num_classes=num_classes,
        global_pool=global_pool,
        drop_rate=drop_rate,
        proj_drop_rate=proj_drop_rate,
        attn_drop_rate=attn_drop_rate,
        drop_path_rate=drop_path_rate,
        norm_layer=norm_layer,
        pretrain_size=pretrain_size,
        img_size=img_size,
        device=device,
        dtype=dtype,
    )


def _cfg(repo: str | None, size: int = 224, crop_pct: float = 0.875, crop_mode: str = "center") -> dict[str, Any]:
    hub = {"hf_hub_id": f"DaiShiResearch/{repo}", "hf_hub_filename": f"{repo.replace('-', '_')}.pth"} if repo else {}
    return {
        **LAYOUT,
        **hub,
        "input_size": (3, size, size),
        "pool_size": (size // 32, size // 32),
        "crop_pct": crop_pct,
        "crop_mode": crop_mode,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "num_classes": 1000,
        "license": "apache-2.0",
        "origin_url": "https://github.com/DaiShiResearch/TransNeXt",
        "paper_ids": "arXiv:2311.17132",
    }


_cfg_384 = partial(_cfg, size=384, crop_pct=1.0, crop_mode="squash")

default_cfgs = generate_default_cfgs(
    {
        "transnext_pico": _cfg(None),
        "transnext_micro.in1k": _cfg("transnext-micro-224-1k"),
        "transnext_tiny.in1k": _cfg("transnext-tiny-224-1k"),
        "transnext_small.in1k": _cfg("transnext-small-224-1k"),
        "transnext_small.in1k_384": _cfg_384("transnext-small-384-1k-ft-1k"),
        "transnext_base.in1k": _cfg("transnext-base-224-1k"),
        "transnext_base.in1k_384": _cfg_384("transnext-base-384-1k-ft-1k"),
        "transnext_micro_aaaa.in1k_256": _cfg("transnext-micro-AAAA-256-1k", size=256),
    }
)

_variant = partial(timm_model, transnext, out_indices=(0, 1, 2, 3))
_AAAM = {"mlp_ratios": (8, 8, 4, 4), "pool_ratios": (8, 4, 2, None)}
_MICRO = {"dims": (48, 96, 192, 384), "depths": (2, 2, 15, 2), "num_heads": (2, 4, 8, 16)}


@register_model
def transnext_pico(pretrained: bool = False, **kwargs: Any) -> Backbone:
    """Half the widths of Micro: 2.2M parameters, 0.5G multiply-adds at 224.

    It has no published weights. It stands in for the paper's model of tables 7 and 8, whose widths are not published.
    """
    args = {"dims": (24, 48, 96, 192), "depths": (2, 2, 6, 2), "num_heads": (1, 2, 4, 8)}
    return _variant("transnext_pico", pretrained, **dict(_AAAM | args, **kwargs))


@register_model
def transnext_micro(pretrained: bool = False, **kwargs: Any) -> Backbone:
    """TransNeXt-Micro: 12.8M parameters, 2.7G multiply-adds at 224."""
    return _variant("transnext_micro", pretrained, **dict(_AAAM | _MICRO, **kwargs))


@register_model
def transnext_tiny(pretrained: bool = False, **kwargs: Any) -> Backbone:
    """TransNeXt-Tiny: 28.3M parameters, 5.7G multiply-adds at 224."""
    args = {"dims": (72, 144, 288, 576), "depths": (2, 2, 15, 2), "num_heads": (3, 6, 12, 24)}
    return _variant("transnext_tiny", pretrained, **dict(_AAAM | args, **kwargs))


@register_model
def transnext_small(pretrained: bool = False, **kwargs: Any) -> Backbone:
    """TransNeXt-Small: 49.7M parameters, 10.3G multiply-adds at 224."""
    args = {"dims": (72, 144, 288, 576), "depths": (5, 5, 22, 5), "num_heads": (3, 6, 12, 24)}
    return _variant("transnext_small", pretrained, **dict(_AAAM | args, **kwargs))


@register_model
def transnext_base(pretrained: bool = False, **kwargs: Any) -> Backbone:
    """TransNeXt-Base: 89.7M parameters, 18.4G multiply-adds at 224."""
    args = {"dims": (96, 192, 384, 768), "depths": (5, 5, 23, 5), "num_heads": (4, 8, 16, 32)}
    return _variant("transnext_base", pretrained, **dict(_AAAM | args, **kwargs))


@register_model
def transnext_micro_aaaa(pretrained: bool = False, **kwargs: Any) -> Backbone:
    """TransNeXt-Micro with aggregated attention in all four stages: 13.1M parameters, 3.3G multiply-adds at 256."""
    args = {**_MICRO, "mlp_ratios": (8, 8, 4, 4), "pool_ratios": (16, 8, 4, 2), "pretrain_size": 256, "img_size": 256}
    return _variant("transnext_micro_aaaa", pretrained, **dict(args, **kwargs))
