"""What a user reads when an argument is wrong."""

import os
import sys
from typing import NoReturn


def refuse(argument: str, problem: str) -> NoReturn:
    if os.environ.get("LOCAL_RANK", "0") == "0":  # torchrun's number of this process: one speaks for its machine
        print(f"train.py: error: argument {argument}: {problem}", file=sys.stderr)
    sys.exit(2)
