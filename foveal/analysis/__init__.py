"""Looking into models: effective receptive fields, attention maps, and what they cost, whole and block by block."""

from foveal.analysis import complexity
from foveal.analysis.attention_maps import AttentionWeights, attention_blocks, attention_map, attention_weights
from foveal.analysis.attention_pictures import draw_attention_maps
from foveal.analysis.flops import count_flops, count_multiply_adds
from foveal.analysis.parameters import count_parameters
from foveal.analysis.profile import BlockCost, draw_profile, profile_blocks
from foveal.analysis.receptive_field import draw_receptive_fields, effective_receptive_field

__all__ = [
    "AttentionWeights",
    "BlockCost",
    "attention_blocks",
    "attention_map",
    "attention_weights",
    "complexity",
    "count_flops",
    "count_multiply_adds",
    "count_parameters",
    "draw_attention_maps",
    "draw_profile",
    "draw_receptive_fields",
    "effective_receptive_field",
    "profile_blocks",
]
