"""A stage of a backbone: its declaration, and the module built from it."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from timm.layers import LayerScale
from timm.models import checkpoint, checkpoint_seq
from torch import Tensor, nn

from foveal.blocks import OverlapPatchEmbed
from foveal.blocks._checks import check_probability
from foveal.blocks._factory import call, located
from foveal.models._dry_run import output_shape
from foveal.models._reading import is_plain_sequence, read_stage
from foveal.models.block import Block
from foveal.ops.backend import infers_on_cpu

Factory = Callable[..., nn.Module]


class Stage:
    """The declaration of one stage: a downsampling, ``depth`` blocks of a mixer and an MLP, a norm.

    A mixer or an MLP is any callable ``dim -> nn.Module`` over ``(B, H, W, C)`` that keeps the shape. It is called with
    the width and with those of device, dtype, attn_drop, proj_drop, drop, pretrain_grid and bias_grid that its
    signature names and no ``functools.partial`` has fixed.

    Args:
        dim: channels C.
        depth: number of blocks.
        mixer: a factory for all blocks, or a list of one factory a block.
        mlp: likewise.
        downsample: a factory ``(in_chans, dim) -> nn.Module``; None means OverlapPatchEmbed, 7 x 7 with stride 4 for
            the first stage, 3 x 3 with stride 2 for the others.
        norm_layer: the norms of blocks and stage, ``dim -> nn.Module``; None means the backbone's.
        layer_scale: initial value of a LayerScale on both branches of a block; None means none.
        drop_path: a stochastic depth rate, or a list of one a block; None takes the backbone's rule.

    Example:
        >>> Stage(dim=96, depth=2, mixer=partial(AggregatedAttention, num_heads=4), mlp=ConvGLU)
    """

    def __init__(
        self,
        *,
        dim: int,
        depth: int,
        mixer: Factory | Sequence[Factory],
        mlp: Factory | Sequence[Factory],
        downsample: Factory | None = None,
        norm_layer: Factory | None = None,
        layer_scale: float | None = None,
        drop_path: float | Sequence[float] | None = None,
    ):
        for name, value in (("dim", dim), ("depth", depth)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} of a Stage must be a positive integer, got {value!r}")
        self.dim = dim
        self.depth = depth
        self.mixer = mixer
        self.mlp = mlp
        self.downsample = downsample
        self.norm_layer = norm_layer
        self.layer_scale = layer_scale
        self.drop_path = drop_path

    def __repr__(self) -> str:
        return f"Stage({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stage) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]


class StageModule(nn.Module):
    """A stage as a module: ``norm(blocks(downsample(x)))``, ``(B, H, W, C) -> (B, H', W', C')``."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[Block], norm: nn.Module):
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.norm = norm
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        if infers_on_cpu(x):
            return read_stage(self, x)
        x = self.downsample(x)
        if not self.grad_checkpointing or not self.training:
            return self.norm(self.blocks(x))
        if is_plain_sequence(self.blocks):
            return self.norm(checkpoint_seq(self.blocks, x))
        return self.norm(checkpoint(self.blocks, x))


def build_downsample(spec: Stage, index: int, in_chans: int, dd: dict[str, Any]) -> nn.Module:
    default = partial(OverlapPatchEmbed, patch_size=7 if index == 0 else 3, stride=4 if index == 0 else 2)
    return call(spec.downsample or default, in_chans, spec.dim, offered=dd, where=f"stage {index}, downsample")


def build_stage(
    spec: Stage,
    index: int,
    downsample: nn.Module,
    *,
    drop_path: Sequence[float],
    norm_layer: Factory,
    offered: dict[str, Any],
    grid: tuple[int, int],
) -> StageModule:
    """Build a stage from its declaration, and check that every block keeps the shape of a map of ``grid`` cells."""
    with located(f"stage {index}"):
        mixers = _one_a_block("mixer", spec.mixer, spec.depth)
        mlps = _one_a_block("mlp", spec.mlp, spec.depth)
        rates = drop_path if spec.drop_path is None else _one_a_block("drop_path", spec.drop_path, spec.depth)
        for rate in rates:
            check_probability("drop_path", rate)
    dd = {name: offered[name] for name in ("device", "dtype")}
    norm = partial(call, spec.norm_layer or norm_layer, spec.dim, offered=dd, where=f"stage {index}, norm_layer")

    def scale(dim: int) -> nn.Module:
        return nn.Identity() if spec.layer_scale is None else LayerScale(dim, init_values=spec.layer_scale, **dd)

    shape = 1, *grid, spec.dim
    stage_norm = norm()
    _check_keeps_shape(stage_norm, shape, dd, f"stage {index}, norm_layer")
    blocks = []
    checked: set[int] = set()
    for i in range(spec.depth):
        parts = []
        for name, factory in (("mixer", mixers[i]), ("mlp", mlps[i])):
            where = f"stage {index}, block {i}, {name}"
            part = call(factory, spec.dim, offered=offered, where=where)
            if id(factory) not in checked:
                checked.add(id(factory))
                _check_keeps_shape(part, shape, dd, where)
            parts.append(part)
        mixer, mlp = parts
        blocks.append(Block(spec.dim, mixer, mlp, (norm(), norm()), scale, rates[i]))
    return StageModule(downsample, blocks, stage_norm)


def _check_keeps_shape(module: nn.Module, shape: tuple[int, ...], dd: dict[str, Any], where: str) -> None:
    with located(where):
        out = output_shape(module, shape, **dd)
        if out != shape:
            raise ValueError(f"must keep the shape (B, H, W, C) of its input, but turned {shape} into {out}")


def _one_a_block(name: str, value: Any, depth: int) -> list[Any]:
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != depth:
            raise ValueError(f"{name} must be one for the stage or a list of depth = {depth}, got {len(value)} of them")
        return list(value)
    return [value] * depth
