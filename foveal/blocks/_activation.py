"""Which activation modules the ops know by name."""

from torch import nn


def activation_name(act: nn.Module) -> str | None:
    """The name under which foveal's ops fuse an activation, or None where they do not know it."""
    if type(act) is nn.GELU:
        return "gelu" if act.approximate == "none" else "gelu_tanh"
    return {nn.ReLU: "relu", nn.SiLU: "silu", nn.Identity: "identity"}.get(type(act))
