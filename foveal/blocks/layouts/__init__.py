"""Blocks in networks of other layouts: ``(B, C, H, W)`` maps, ``(B, N, C)`` tokens, and timm's signatures for parts."""

from foveal.blocks.layouts.channels_first import ChannelsFirst
from foveal.blocks.layouts.grid import CarriedGrid, PatchGrid, grid_of
from foveal.blocks.layouts.signatures import attn_layer, mlp_layer, token_mixer
from foveal.blocks.layouts.tokens import SizedTokens, TokenMixer, Tokens

__all__ = [
    "CarriedGrid",
    "ChannelsFirst",
    "PatchGrid",
    "SizedTokens",
    "TokenMixer",
    "Tokens",
    "attn_layer",
    "grid_of",
    "mlp_layer",
    "token_mixer",
]
