"""Models by their names in timm, and the weights of files."""

import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import timm
from torch import Tensor, nn

from common.refusals import brief, refuse
from foveal.models import Backbone
from foveal.models.checkpoints import checkpoint_filter_fn, load_file

Weights = dict[str, Tensor]


def import_modules(args: Namespace) -> None:
    """Import modules of the user's, which register models in timm; those of the current folder too."""
    names = vars(args)["import"]
    if names and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    for name in names:
        try:
            import_module(name)
        except Exception as error:  # there is none, or it fails
            refuse("--import", f"{name} cannot be imported ({brief(error)})")


def check_model(name: str, argument: str = "--model") -> None:
    if not timm.is_model(name):
        others = "timm.list_models() names those it does, --import takes modules that register others"
        refuse(argument, f"timm knows no model {name!r}; {others}")


def load_model(
    name: str, checkpoint: str | Path | None = None, random_weights: bool = False, argument: str = "--model", **kwargs
) -> nn.Module:
    """A model with the weights of a checkpoint, with random ones, or else with those of the hub."""
    check_model(name, argument)
    if random_weights or checkpoint:
        model = timm.create_model(name, **kwargs)
        if checkpoint:
            load_weights(model, checkpoint, name)
        return model
    try:
        return timm.create_model(name, pretrained=True, **kwargs)
    except Exception as error:  # of whatever stands between us and the hub
        hint = "pass --checkpoint or --random-weights"
        refuse(argument, f"no weights of {name} from the hub; {hint} ({brief(error)})")


def load_weights(
    model: nn.Module,
    file: str | Path,
    owner: str,
    argument: str = "--checkpoint",
    choose: Callable[[Weights, nn.Module], Weights] = lambda weights, model: weights,
) -> None:
    """Load a file, for foveal's models also one in the official layout, or refuse it.

    Args:
        owner: whose weights they should be, for the refusal.
        choose: what of the weights to load.
    """
    with weights_of(file, owner, argument):
        weights = load_file(file)
        if isinstance(model, Backbone):
            weights = checkpoint_filter_fn(weights, model)
        model.load_state_dict(choose(weights, model))


@contextmanager
def weights_of(file: str | Path, owner: str, argument: str) -> Iterator[None]:
    """Refuse a file that is missing, damaged, or another model's."""
    if not Path(file).is_file():
        refuse(argument, f"there is no file {file}")
    try:
        yield
    except Exception as error:
        refuse(argument, f"{file} holds no weights of {owner} ({brief(error)})")


def sized(name: str, size: int | None) -> dict[str, Any]:
    """The argument by which a model of one image size gets its position embedding resampled to another."""
    fixed = getattr(timm.get_pretrained_cfg(name), "fixed_input_size", False)
    return {"img_size": size} if size and fixed else {}
