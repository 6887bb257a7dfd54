"""The learned temperature of cosine attention (equation 9): logits are scaled by softplus(tau)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_INITIAL_SCALE = 1 / 0.24


def init_temperature(temperature: Tensor) -> None:
    """tau such that softplus(tau) = 1 / 0.24."""
    nn.init.constant_(temperature, math.log(math.expm1(_INITIAL_SCALE)))


def temperature_scale(temperature: Tensor) -> Tensor:
    """``softplus(tau)`` in at least float32."""
    return F.softplus(temperature.to(torch.promote_types(temperature.dtype, torch.float32)))
