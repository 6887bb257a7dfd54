"""The network that is trained, and its optimiser."""

from argparse import Namespace
from functools import partial
from typing import Any

import timm
import torch
from timm.models import is_model_in_modules
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn

from common.models import load_weights, sized
from common.refusals import brief, refuse
from foveal.blocks import AggregatedAttention, ConvGLU, LengthScaledCosineAttention
from foveal.models import Backbone, Stage


def small_backbone(img_size: int, **kwargs) -> Backbone:
    """Three stages: fovea and periphery in the first two, global attention in the last."""
    return Backbone(
        [
            Stage(dim=48, depth=2, mixer=partial(AggregatedAttention, num_heads=2, pool_ratio=4), mlp=ConvGLU),
            Stage(dim=96, depth=2, mixer=partial(AggregatedAttention, num_heads=4, pool_ratio=2), mlp=ConvGLU),
            Stage(dim=192, depth=2, mixer=partial(LengthScaledCosineAttention, num_heads=8), mlp=ConvGLU),
        ],
        pretrain_size=img_size,
        **kwargs,
    )


def build_model(args: Namespace, num_classes: int, in_chans: int, weights: bool = False) -> nn.Module:
    """The model of the arguments, with the weights that fine-tuning starts from where ``weights`` is true."""
    kwargs: dict[str, Any] = {"num_classes": num_classes, "in_chans": in_chans}
    if args.drop_path:
        kwargs["drop_path_rate"] = args.drop_path
    pretrain_size = args.pretrain_size or args.img_size
    if args.model is None:
        return small_backbone(pretrain_size, **kwargs)
    if is_model_in_modules(args.model, ["transnext"]):
        kwargs["pretrain_size"] = pretrain_size
    else:
        kwargs |= sized(args.model, args.img_size)
    source = args.weights if weights else None
    try:
        model = timm.create_model(args.model, pretrained=source == "hub", **kwargs)
    except TypeError as error:
        if "drop_path_rate" not in str(error):
            raise
        refuse("--drop-path", f"{args.model} has no stochastic depth; pass --drop-path 0")
    except Exception as error:  # of whatever stands between us and the hub
        if source != "hub":
            raise
        refuse("--weights", f"no weights of {args.model} in {source} ({brief(error)})")
    if source not in (None, "hub"):
        load_weights(model, source, args.model, "--weights", choose=own_head_for_other_classes)
    return model


def own_head_for_other_classes(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The weights, but for a classifier of another number of classes."""
    own, head = model.state_dict(), f"{model.default_cfg['classifier']}."
    other = {name for name in weights if name.startswith(head) and weights[name].shape != own[name].shape}
    return {name: own[name] if name in other else weight for name, weight in weights.items()}


def build_optimizer(args: Namespace, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW, without weight decay for norms, biases and what the model exempts."""
    return create_optimizer_v2(model, "adamw", lr=args.lr, weight_decay=args.weight_decay, layer_decay=args.layer_decay)


def build_scheduler(args: Namespace, optimizer: torch.optim.Optimizer, steps: int) -> Scheduler:
    """The learning rate as a function of the step, of which an epoch has so many."""
    return create_scheduler_v2(
        optimizer,
        sched=args.schedule,
        num_epochs=args.epochs,
        min_lr=args.min_lr,
        warmup_lr=args.warmup_lr,
        warmup_epochs=args.warmup_epochs,
        step_on_epochs=False,
        updates_per_epoch=steps,
    )[0]
