"""Tiny models of timm's architectures, the real classes, and where blocks go into them."""

from collections.abc import Callable
from dataclasses import dataclass

import timm
from timm.models.inception_next import MetaNeXt
from timm.models.maxxvit import MaxxVit, MaxxVitCfg, MaxxVitConvCfg, MaxxVitTransformerCfg
from timm.models.metaformer import Attention, LayerNorm2dNoBias, LayerNormNoBias, MetaFormer, Pooling, SepConv
from torch import nn

Grids = list[tuple[int, int]]


@dataclass(frozen=True)
class Host:
    """A tiny model, the image size in pixels, and patterns of the modules to replace, with the grids that they see."""

    build: Callable[[], nn.Module]
    size: tuple[int, int]
    grids: Grids
    mlp: str
    mixer: str | None = None


def _timm(name: str, **kwargs) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=5, **kwargs)


def _vit(name: str, size: tuple[int, int] = (24, 48), mixer: str | None = None, **kwargs) -> Host:
    arguments = {"embed_dim": 24, "depth": 2, "num_heads": 3, "img_size": 32, "patch_size": 8}
    if size != (32, 32):
        arguments["dynamic_img_size"] = True
    return Host(_timm(name, **arguments, **kwargs), size, [(size[0] // 8, size[1] // 8)] * 2, "blocks.*.mlp", mixer)


def _swin(name: str) -> Host:
    arguments = {"embed_dim": 16, "depths": (2, 1), "num_heads": (2, 4), "window_size": 4, "patch_size": 4}
    build = _timm(name, img_size=32, strict_img_size=False, **arguments)
    return Host(build, (32, 64), [(8, 16), (8, 16), (4, 8)], "layers.*.blocks.*.mlp", "layers.*.blocks.*.attn")


def _pyramid(build: Callable[[], nn.Module], mixer: str, stages: int = 4) -> Host:
    grids = [(8, 16), (4, 8), (2, 4), (1, 2)][:stages]
    return Host(build, (32, 64), grids, "stages.*.blocks.*.mlp", f"stages.*.blocks.*.{mixer}")


def _convnext(**kwargs) -> Host:
    build = _timm("convnext_tiny", depths=(1, 1, 1, 1), dims=(8, 16, 16, 16), ls_init_value=0.5, **kwargs)
    return _pyramid(build, "conv_dw")


def _metaformer(*token_mixers, **kwargs) -> Host:
    arguments = {"depths": (1, 1), "dims": (16, 32), "num_classes": 5, **kwargs}
    return _pyramid(lambda: MetaFormer(token_mixers=list(token_mixers), **arguments), "token_mixer", stages=2)


def _inception_next() -> MetaNeXt:
    return MetaNeXt(depths=(1, 1), dims=(16, 32), num_classes=5, mlp_ratios=(4, 4), ls_init_value=0.5)


def _maxxvit(grids: Grids, mlp: str, mixer: str | None = None, *, blocks: str, conv: str = "mbconv", **kwargs) -> Host:
    transformer = MaxxVitTransformerCfg(dim_head=8, window_size=(4, 4), grid_size=(4, 4), init_values=0.5, **kwargs)
    convolution = MaxxVitConvCfg(conv, init_values=0.5)
    cfg = MaxxVitCfg((16, 32), (1, 1), tuple(blocks), 8, conv_cfg=convolution, transformer_cfg=transformer)
    return Host(lambda: MaxxVit(cfg, img_size=64, num_classes=5), (64, 64), grids, mlp, mixer)


_PVT = {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 16, 16), "num_heads": (1, 2, 2, 2)}
_HALVES = [(16, 16), (16, 16), (8, 8), (8, 8)], "stages.*.blocks.*.attn_*.mlp", "stages.*.blocks.*.attn_*.attn"

HOSTS = {
    "ViT, class token": _vit("vit_tiny_patch16_224", size=(32, 32)),
    "ViT, registers, any size": _vit("vit_tiny_patch16_224", reg_tokens=4),
    "ViT, no prefix tokens": _vit("vit_tiny_patch16_224", mixer="blocks.*.attn", class_token=False, global_pool="avg"),
    "DeiT, distilled": _vit("deit_tiny_distilled_patch16_224"),
    "EVA-02": _vit("eva02_tiny_patch14_224", size=(32, 32)),
    "DINOv3": _vit("vit_small_patch16_dinov3"),
    "SAM": _vit("samvit_base_patch16_224", size=(32, 32), global_attn_indexes=(1,), window_size=2),
    "Swin": _swin("swin_tiny_patch4_window7_224"),
    "SwinV2": _swin("swinv2_tiny_window8_256"),
    "PVTv2": _pyramid(_timm("pvt_v2_b0", **_PVT), "attn"),
    "ConvNeXt": _convnext(),
    "ConvNeXt, channels first": _convnext(conv_mlp=True),
    "ConvFormer": _metaformer(SepConv, SepConv),
    "PoolFormer": _metaformer(Pooling, Pooling),
    "CAFormer": _metaformer(SepConv, Attention, norm_layers=[LayerNorm2dNoBias, LayerNormNoBias]),
    "InceptionNeXt": _pyramid(_inception_next, "token_mixer", stages=2),
    "MaxViT": _maxxvit(*_HALVES, blocks="MM"),
    "MaxViT, channels first": _maxxvit(*_HALVES, blocks="MM", use_nchw_attn=True),
    "CoAtNet": _maxxvit([(8, 8)], "stages.1.blocks.*.mlp", blocks="CT"),
    "CoAtNeXt": _maxxvit([(16, 16), (8, 8)], "stages.*.blocks.*.mlp", blocks="CT", conv="convnext"),
}
MIXED = [name for name, host in HOSTS.items() if host.mixer]
