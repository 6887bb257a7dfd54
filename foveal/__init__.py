"""foveal: building blocks for composing vision backbones.

Importing it registers the TransNeXt variants in timm.
"""

from foveal import blocks, models, ops
from foveal._version import __version__
from foveal.models import swap

__all__ = ["__version__", "blocks", "models", "ops", "swap"]
