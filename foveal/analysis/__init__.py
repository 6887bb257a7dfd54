"""Looking into trained models: effective receptive fields."""

from foveal.analysis.receptive_field import draw_receptive_fields, effective_receptive_field

__all__ = ["draw_receptive_fields", "effective_receptive_field"]
