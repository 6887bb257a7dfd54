"""Stage declarations, the backbone built from them, and TransNeXt as one configuration, registered in timm."""

from foveal.models.backbone import Backbone
from foveal.models.stage import Stage
from foveal.models.transnext import transnext

__all__ = ["Backbone", "Stage", "transnext"]
