"""Activate and pool: the coarse map that peripheral attention looks at."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from foveal.blocks._checks import check_map
from foveal.blocks._initialization import init_convolution
from foveal.blocks._module import MapModule
from foveal.blocks._plain import activation_name
from foveal.ops import activate_and_pool
from foveal.ops.tracing import integers


class ActivateAndPool(MapModule):
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
        x, grid = self.proj(x), integers(lambda: grid)
        if act := activation_name(self.act, x):
            return self.norm(activate_and_pool(x, grid, act))
        return self.norm(activate_and_pool(self.act(x), grid, "identity"))  # pooling alone
