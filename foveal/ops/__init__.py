"""Functions on tensors: what the blocks compute, in plain PyTorch and, where it serves, compiled."""

from foveal.ops.attention import aggregated_attention, attention_weights
from foveal.ops.backend import backend, current_backend
from foveal.ops.gate import depthwise_gate
from foveal.ops.glu import conv_glu
from foveal.ops.log_cpb import log_cpb_table
from foveal.ops.norm import add_layer_norm
from foveal.ops.pool import activate_and_pool
from foveal.ops.position_bias import PositionBias
from foveal.ops.window import window_scores, window_sum

__all__ = [
    "PositionBias",
    "activate_and_pool",
    "add_layer_norm",
    "aggregated_attention",
    "attention_weights",
    "backend",
    "conv_glu",
    "current_backend",
    "depthwise_gate",
    "log_cpb_table",
    "window_scores",
    "window_sum",
]
