"""Stage declarations, the backbone built from them, TransNeXt as one configuration in timm; blocks in other models."""

from foveal.models.backbone import Backbone
from foveal.models.hybrids import ConvGLUVisionTransformer
from foveal.models.stage import Stage
from foveal.models.swap import Replacements, swap
from foveal.models.transnext import transnext

__all__ = ["Backbone", "ConvGLUVisionTransformer", "Replacements", "Stage", "swap", "transnext"]
