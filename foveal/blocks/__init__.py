"""Building blocks over channels-last maps, ``(B, H, W, C) -> (B, H', W', C')``, at any H, W >= 1."""

from foveal.blocks import inference as _inference  # noqa: F401 (registers the readings)
from foveal.blocks.activate_and_pool import ActivateAndPool
from foveal.blocks.aggregated_attention import AggregatedAttention
from foveal.blocks.conv_ffn import ConvFFN
from foveal.blocks.conv_glu import ConvGLU
from foveal.blocks.cosine_attention import LengthScaledCosineAttention
from foveal.blocks.glu import GLU, ConvGLUType1, ConvGLUType2, ConvGLUType3
from foveal.blocks.log_cpb import LogCPB
from foveal.blocks.patch_embed import OverlapPatchEmbed
from foveal.blocks.pixel_focused_attention import PixelFocusedAttention
from foveal.blocks.spatial_reduction_attention import SpatialReductionAttention

__all__ = [
    "GLU",
    "ActivateAndPool",
    "AggregatedAttention",
    "ConvFFN",
    "ConvGLU",
    "ConvGLUType1",
    "ConvGLUType2",
    "ConvGLUType3",
    "LengthScaledCosineAttention",
    "LogCPB",
    "OverlapPatchEmbed",
    "PixelFocusedAttention",
    "SpatialReductionAttention",
]
