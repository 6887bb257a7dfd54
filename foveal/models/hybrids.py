"""Architectures of timm with foveal's blocks in them, registered as models of their own; no weights are published."""

from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer

from foveal.blocks import ConvGLU
from foveal.models.hosts import swap

__all__ = ["ConvGLUVisionTransformer"]  # timm adds every registered entry point below


class ConvGLUVisionTransformer(VisionTransformer):
    """timm's ViT with a ConvGLU of the MLP's size in every block; class and register tokens skip its convolution.

    Arguments are VisionTransformer's, but for ``mlp_layer`` and a ``patch_drop_rate`` above 0.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        if "mlp_layer" in kwargs:
            raise TypeError("ConvGLUVisionTransformer has ConvGLUs as MLPs and takes no mlp_layer")
        super().__init__(*args, **kwargs)
        swap(self, {"blocks.*.mlp": ConvGLU})


_cfg = {
    "input_size": (3, 224, 224),
    "fixed_input_size": True,
    "pool_size": None,
    "crop_pct": 0.9,
    "interpolation": "bicubic",
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "num_classes": 1000,
    "first_conv": "patch_embed.proj",
    "classifier": "head",
    "license": "apache-2.0",
}
default_cfgs = generate_default_cfgs(
    {"vit_tiny_patch16_convglu_224.untrained": _cfg, "vit_small_patch16_convglu_224.untrained": _cfg}
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> ConvGLUVisionTransformer:
    feature_cfg = {"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"}
    return build_model_with_cfg(ConvGLUVisionTransformer, variant, pretrained, feature_cfg=feature_cfg, **kwargs)


@register_model
def vit_tiny_patch16_convglu_224(pretrained: bool = False, **kwargs: Any) -> ConvGLUVisionTransformer:
    """ViT-Ti/16 with ConvGLU: 5.8M parameters, 1.3G multiply-adds at 224."""
    args = {"patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3}
    return _create("vit_tiny_patch16_convglu_224", pretrained, **dict(args, **kwargs))


@register_model
def vit_small_patch16_convglu_224(pretrained: bool = False, **kwargs: Any) -> ConvGLUVisionTransformer:
    """ViT-S/16 with ConvGLU: 22.2M parameters, 4.6G multiply-adds at 224."""
    args = {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6}
    return _create("vit_small_patch16_convglu_224", pretrained, **dict(args, **kwargs))
