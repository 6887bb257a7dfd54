"""What a user reads when an argument is wrong: one sentence that names it. Nothing here takes long to import."""

import os
import sys
from argparse import ArgumentParser
from pathlib import Path
from textwrap import shorten
from typing import NoReturn


def refuse(argument: str, problem: object) -> NoReturn:
    if os.environ.get("LOCAL_RANK", "0") == "0":  # torchrun's number of this process: one speaks for its machine
        print(f"{Path(sys.argv[0]).name}: error: argument {argument}: {problem}", file=sys.stderr)
    sys.exit(2)


def brief(error: Exception) -> str:
    return f"{type(error).__name__}: {shorten(str(error), 300)}".removesuffix(": ")


def refuse_missing(*options: str, named: bool = False) -> None:
    """Refuse files on the command line that do not exist, before the imports that take seconds.

    Args:
        options: that take a file each, or the word hub.
        named: they take NAME=FILE, one or several.
    """
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    for option in options:
        parser.add_argument(option, nargs="+" if named else 1, default=[], dest=option)
    for option, values in vars(parser.parse_known_args()[0]).items():
        for value in values:
            file = value.partition("=")[2] if named else value
            if file and file != "hub" and not Path(file).is_file():
                refuse(option, f"there is no file {file}")
