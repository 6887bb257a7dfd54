"""Stage declarations, the backbone built from them, TransNeXt as one configuration in timm; blocks in other models."""

from foveal.models.backbone import Backbone
from foveal.models.hosts import Replacements, swap
from foveal.models.hybrids import ConvGLUVisionTransformer
from foveal.models.in_timm import timm_model
from foveal.models.stage import Stage
from foveal.models.transnext import transnext

__all__ = ["Backbone", "ConvGLUVisionTransformer", "Replacements", "Stage", "swap", "timm_model", "transnext"]
