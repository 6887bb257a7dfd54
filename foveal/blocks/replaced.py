"""Layers that quantisation or an adapter has put in the place of a block's own."""

from torch import nn


def may_take_apart(linear: nn.Module) -> bool:
    """Whether a layer is a plain Linear, whose weight a block may slice or hand to an op, not only call."""
    return type(linear) is nn.Linear and not hasattr(type(linear.weight), "__tensor_flatten__")
