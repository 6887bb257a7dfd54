"""Parameters of a model."""

from torch import nn


def count_parameters(model: nn.Module) -> int:
    """The number of a module's parameters, one that is shared counted once."""
    return sum(parameter.numel() for parameter in model.parameters())
