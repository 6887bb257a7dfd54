"""Activate and pool: the coarse map that peripheral attention looks at."""

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from foveal.blocks._activation import activation_name
from foveal.blocks._checks import check_map
from foveal.blocks._initialization import init_convolution
from foveal.blocks.inference import infers_on_cpu, is_plain_linear, normalize
from foveal.ops import activate_and_pool


class ActivateAndPool(nn.Module):
    """Project, activate, average over a coarser grid, normalise (equation 5).

    ``norm(adaptive_avg_pool(act(proj(x)), grid))``, from ``(B, H, W, C)`` to ``(B, Hp, Wp, C)``.

    Args:
        dim: channels C.
        act_layer: activation between projection and pooling.
        norm_layer: norm of the pooled map.
    """

    def __init__(
        self,
        dim: int,
        *,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.dim = dim
        self.proj = nn.Linear(dim, dim, **dd)
        self.act = act_layer()
        self.norm = norm_layer(dim, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init_convolution(self.proj)

    def forward(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """Pool ``x`` of shape ``(B, H, W, C)`` to ``grid`` = (Hp, Wp) cells."""
        check_map(x, self.dim)
        name = activation_name(self.act)
        if name is None:
            pooled = activate_and_pool(self.act(self.proj(x)), grid, "identity")
        elif infers_on_cpu(x, self.training) and is_plain_linear(self.proj):
            pooled = activate_and_pool(F.linear(x, self.proj.weight), grid, name, input_bias=self.proj.bias)
        else:
            pooled = activate_and_pool(self.proj(x), grid, name)
        return normalize(pooled, self.norm)
