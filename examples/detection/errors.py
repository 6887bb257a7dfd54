"""What a user reads when an argument is wrong."""

import sys
from typing import NoReturn


def refuse(argument: str, problem: str) -> NoReturn:
    print(f"detect.py: error: argument {argument}: {problem}", file=sys.stderr)
    sys.exit(2)
