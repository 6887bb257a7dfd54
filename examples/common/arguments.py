"""Kinds of arguments that several examples take."""

import argparse
from collections.abc import Callable

import torch

from common.refusals import brief, refuse


def at_least(lowest: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if (value := int(text)) < lowest:
            raise argparse.ArgumentTypeError(f"must be at least {lowest}, got {value}")
        return value

    return number


positive = at_least(1)


def image_size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise argparse.ArgumentTypeError(f"expected HEIGHTxWIDTH in pixels, as 224x224, got {text!r}")
    return int(height), int(width)


def add_device(parser: argparse.ArgumentParser) -> None:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help="default: %(default)s")


def check_device(name: str, choose: Callable[[str], torch.device] = torch.device) -> torch.device:
    """The device of a name, which holds a tensor."""
    try:
        return torch.empty(0, device=choose(name)).device
    except (AssertionError, RuntimeError) as error:
        refuse("--device", brief(error))


def add_import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--import",
        nargs="+",
        default=[],
        metavar="MODULE",
        help="import these first, from here too: modules that register models in timm, as docs/training.md shows",
    )
