"""Looking into models: effective receptive fields, and what they cost."""

from foveal.analysis import complexity
from foveal.analysis.flops import count_flops, count_multiply_adds
from foveal.analysis.receptive_field import draw_receptive_fields, effective_receptive_field

__all__ = [
    "complexity",
    "count_flops",
    "count_multiply_adds",
    "draw_receptive_fields",
    "effective_receptive_field",
]
