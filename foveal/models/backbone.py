"""Backbone: stages in a row, with a classifier on top, at home in timm."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from timm.layers import (
    ClassifierHead,
    calculate_drop_path_rates,
    get_device_dtype,
    register_notrace_function,
)
from timm.models._features import feature_take_indices
from timm.models._input import update_model_input_size
from torch import Tensor, fx, nn

from foveal.blocks._checks import check_probability, to_grid
from foveal.blocks._factory import located
from foveal.blocks._initialization import init_linear
from foveal.models._dry_run import output_shape
from foveal.models.stage import Stage, build_downsample, build_stage
from foveal.ops.tracing import shape_of

_PROBE = 256  # side of the map on which a downsampling's ratio is read off


@fx.wrap
@register_notrace_function
def images_to_maps(x: Tensor, in_chans: int) -> Tensor:
    """Images ``(B, in_chans, H, W)`` as channels-last maps, without a copy."""
    if x.dim() != 4 or shape_of(x)[1] != in_chans:
        raise ValueError(f"x must be images of shape (B, {in_chans}, H, W), got {tuple(x.shape)}")
    return x.permute(0, 2, 3, 1)


class Backbone(nn.Module):
    """A hierarchical vision backbone assembled from stage declarations, for images of any size.

    Args:
        stages: one :class:`Stage` for each level, any number.
        in_chans: channels of the images.
        num_classes: classes of the linear head; 0 for none.
        global_pool: timm's pooling of the head, "avg" or "" for none and others.
        drop_rate: dropout before the head.
        proj_drop_rate: offered to mixers as proj_drop, to MLPs as drop.
        attn_drop_rate: offered to mixers as attn_drop.
        drop_path_rate: stochastic depth, rising linearly over all blocks from 0 to this rate.
        norm_layer: norms of blocks and stages.
        pretrain_size: image size, in pixels, at pre-training; every stage's mixers get their ``pretrain_grid`` of it.
        img_size: image size, in pixels, that interpolated position biases are made for; others need none.

    Raises:
        ValueError, TypeError: where a declaration is wrong, naming the stage and the block.

    Example:
        >>> net = Backbone([Stage(dim=48, depth=2, mixer=partial(AggregatedAttention, num_heads=2), mlp=ConvGLU)])
        >>> net(torch.randn(1, 3, 64, 96)).shape
        torch.Size([1, 1000])
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: Callable[..., nn.Module] | None = None,
        pretrain_size: int | tuple[int, int] | None = None,
        img_size: int | tuple[int, int] | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if not isinstance(stages, Sequence) or not stages or not all(isinstance(stage, Stage) for stage in stages):
            raise TypeError(f"stages must be a non-empty sequence of Stage, got {stages!r}")
        rates = {"drop_rate": drop_rate, "proj_drop_rate": proj_drop_rate, "attn_drop_rate": attn_drop_rate}
        for name, rate in {**rates, "drop_path_rate": drop_path_rate}.items():
            check_probability(name, rate)
        dd = {"device": device, "dtype": dtype}
        drops = {"attn_drop": attn_drop_rate, "proj_drop": proj_drop_rate, "drop": proj_drop_rate}
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.global_pool = global_pool
        self.feature_info: list[dict[str, Any]] = []
        depths = [stage.depth for stage in stages]
        drop_path = cast(list[list[float]], calculate_drop_path_rates(drop_path_rate, depths, stagewise=True))
        pretrain_size, img_size = to_grid("pretrain_size", pretrain_size), to_grid("img_size", img_size)
        grid = img_size or pretrain_size or (224, 224)
        width, reduction = in_chans, 1

        modules = []
        for i, spec in enumerate(stages):
            downsample = build_downsample(spec, i, width, dd)
            ratio, grid = _downsampled(downsample, width, spec.dim, grid, dd, where=f"stage {i}, downsample")
            reduction *= ratio
            grids = {
                name: _coarser(size, reduction)
                for name, size in (("pretrain_grid", pretrain_size), ("bias_grid", img_size))
                if size is not None
            }
            stage = build_stage(
                spec,
                i,
                downsample,
                drop_path=drop_path[i],
                norm_layer=norm_layer or partial(nn.LayerNorm, eps=1e-6),
                offered={**dd, **drops, **grids},
                grid=grid,
            )
            modules.append(stage)
            self.feature_info.append({"num_chs": spec.dim, "reduction": reduction, "module": f"stages.{i}"})
            width = spec.dim
        self.stages = nn.Sequential(*modules)
        self.num_features = width
        self.head = ClassifierHead(width, num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        self.head_hidden_size = self.head.num_features
        self._init_head()

    def forward_features(self, x: Tensor) -> Tensor:
        """The last stage's map of images ``(B, in_chans, H, W)``, unpooled: ``(B, C, H', W')``."""
        return self.stages(images_to_maps(x, self.in_chans)).permute(0, 3, 1, 2)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(B, num_classes)`` of images ``(B, in_chans, H, W)``."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The maps of chosen stages, each after its stage's norm, and the last stage's.

        Args:
            x: images ``(B, in_chans, H, W)``.
            indices: the last n stages if an integer, all if None, the named ones if a list.
            norm: no effect, every stage ends in its norm.
            stop_early: leave out the stages after the last one asked for.
            output_fmt: "NCHW" or "NHWC".
            intermediates_only: return the list alone.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NHWC', got {output_fmt!r}")
        taken, last = feature_take_indices(len(self.stages), indices)
        intermediates = []
        x = images_to_maps(x, self.in_chans)
        for i, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x = stage(x)
            if i in taken:
                intermediates.append(x if output_fmt == "NHWC" else x.permute(0, 3, 1, 2))
        return intermediates if intermediates_only else (x.permute(0, 3, 1, 2), intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last one asked for, and the head where it is not wanted or no longer fits."""
        taken, last = feature_take_indices(len(self.stages), indices)
        shorter = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        if shorter:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_head or shorter:
            self.reset_classifier(0, "")
        return taken

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier; the pooling stays where ``global_pool`` is None."""
        self.num_classes = num_classes
        self.head.reset(num_classes, pool_type=global_pool, in_features=self.num_features, **get_device_dtype(self))
        self.head_hidden_size = self.head.num_features
        self.global_pool = self.global_pool if global_pool is None else global_pool
        self._init_head()

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Declare the image size that interpolated position biases are made for. Others follow each input anyway."""
        size = to_grid("img_size", img_size)
        module: Any
        for stage, info in zip(self.stages, self.feature_info, strict=False):
            for module in stage.modules():
                if getattr(module, "bias_resampling", None) == "interpolate":
                    module.bias_grid = _coarser(size, info["reduction"])
        update_model_input_size(self, img_size)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        stage: Any
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The parameters that blocks exempt from weight decay, besides norms and biases."""
        return {
            f"{prefix}.{name}"
            for prefix, module in self.stages.named_modules(prefix="stages")
            for name in getattr(module, "no_weight_decay", set)()
        }

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        blocks = [
            (r"^stages\.(\d+)\.downsample", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^stages\.(\d+)\.norm", (99999,)),
        ]
        return {"stem": r"^stages\.0\.downsample", "blocks": r"^stages\.(\d+)" if coarse else blocks}

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Draw all weights again, children before the modules that hold them (as after ``to_empty``)."""
        module: Any
        if needs_reset:
            for module in reversed(list(self.modules())):
                if module is not self and hasattr(module, "reset_parameters"):
                    module.reset_parameters()
        self._init_head()

    def _init_head(self) -> None:
        if isinstance(self.head.fc, nn.Linear):
            init_linear(self.head.fc)


def _downsampled(
    module: nn.Module, in_chans: int, dim: int, grid: tuple[int, int], dd: dict[str, Any], where: str
) -> tuple[int, tuple[int, int]]:
    """By how much a downsampling reduces a side, and to what it reduces this grid."""
    with located(where):
        probed = output_shape(module, (1, _PROBE, _PROBE, in_chans), **dd)
        out = output_shape(module, (1, *grid, in_chans), **dd)
        if len(out) != 4 or out[-1] != dim:
            raise ValueError(f"must return maps (B, H, W, {dim}), but turned {(1, *grid, in_chans)} into {out}")
    return round(_PROBE / probed[1]), (out[1], out[2])


def _coarser(size: tuple[int, int], reduction: int) -> tuple[int, int]:
    """The grid of an image size at a reduction."""
    return max(1, size[0] // reduction), max(1, size[1] // reduction)
