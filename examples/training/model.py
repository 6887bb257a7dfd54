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
from torch import nn

from foveal.blocks import AggregatedAttention, ConvGLU, LengthScaledCosineAttention
from foveal.models import Backbone, Stage
from foveal.models.checkpoints import checkpoint_filter_fn, load_file
from training.errors import refuse


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
    elif getattr(timm.get_pretrained_cfg(args.model), "fixed_input_size", False):
        kwargs["img_size"] = args.img_size
    source = args.weights if weights else None
    try:
        model = timm.create_model(args.model, pretrained=source == "hub", **kwargs)
        if source not in (None, "hub"):
            load_weights(model, source)
    except TypeError as error:
        if "drop_path_rate" not in str(error):
            raise
        refuse("--drop-path", f"{args.model} has no stochastic depth; pass --drop-path 0")
    except Exception as error:  # no such file, no network, or weights of another model
        if not source:
            raise
        refuse("--weights", f"no weights of {args.model} in {source} ({type(error).__name__}: {error})")
    return model


def load_weights(model: nn.Module, path: str) -> None:
    """Load a file's weights. A classifier for another number of classes stays as it is."""
    weights, own = load_file(path), model.state_dict()
    if isinstance(model, Backbone):
        weights = checkpoint_filter_fn(weights, model)
    head = f"{model.default_cfg['classifier']}."
    other = {name for name in weights if name.startswith(head) and weights[name].shape != own[name].shape}
    kept = {name: own[name] if name in other else weight for name, weight in weights.items()}
    model.load_state_dict(kept)


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
