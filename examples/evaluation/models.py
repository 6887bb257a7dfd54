"""A model by its name and options: the ways in which TransNeXt takes images larger than those of its pre-training."""

from collections.abc import Callable

import timm
import torch
from torch import nn

from common.models import load_model, sized
from common.refusals import refuse
from foveal.blocks import LengthScaledCosineAttention, PixelFocusedAttention


def linear(mixer: nn.Module) -> None:
    if isinstance(mixer, PixelFocusedAttention):
        mixer.pool_grid = mixer.key_grid(mixer.pretrain_grid)


def interpolate(mixer: nn.Module) -> None:
    mixer.bias_resampling, mixer.bias_grid = "interpolate", mixer.pretrain_grid


@torch.no_grad()
def fixed_length(mixer: nn.Module) -> None:
    """Move log N of the pre-training grid into the temperature, which is behind a softplus."""
    rows, columns = mixer.pretrain_grid
    length = rows * columns
    if isinstance(mixer, PixelFocusedAttention):
        rows, columns = mixer.key_grid(mixer.pretrain_grid)
        length = mixer.window_size**2 + rows * columns
    scale = nn.functional.softplus(mixer.temperature.double()) * torch.tensor(length, dtype=torch.float64).log()
    mixer.temperature.copy_(scale.expm1().log())
    mixer.length_scaled = False


OPTIONS: dict[str, Callable[[nn.Module], None]] = {
    "linear": linear,
    "interpolate": interpolate,
    "fixed-length": fixed_length,
}


def has_options(name: str) -> bool:
    """Whether a model of timm's is one of foveal's, whose mixers the options change."""
    return timm.models.is_model_in_modules(name, ["transnext"])


def build(spec: str, size: int, num_classes: int, weights: str, dtype: str, device: str) -> nn.Module:
    """A model by its name and options, in eval mode. ``weights`` is "hub", "random" or a file."""
    name, _, options = spec.partition(":")
    published = timm.get_pretrained_cfg(name)
    if weights == "hub" and published and num_classes != published.num_classes:
        problem = f"the published weights know {published.num_classes} classes and the folder has {num_classes}"
        refuse("--models", f"{problem}; pass --checkpoint")
    torch.manual_seed(0)
    file = None if weights in ("hub", "random") else weights
    kwargs = {"num_classes": num_classes, **sized(name, size)}
    model = load_model(name, file, weights == "random", "--models", **kwargs)
    mixers = [m for m in model.modules() if isinstance(m, PixelFocusedAttention | LengthScaledCosineAttention)]
    for option in filter(None, options.split(",")):
        for mixer in mixers:
            OPTIONS[option](mixer)
    return model.eval().to(device, getattr(torch, dtype))
