"""Direct calls of foveal's ops with each argument wrong in each way: a program, for a crash would end it.

It prints the calls that a compiled op takes and should not and, before each call, its name to stderr.
"""

import sys
from itertools import product
from typing import Any

import torch
from torch import Tensor, arange, rand

from foveal import ops  # noqa: F401  (declares the ops)
from foveal.ops.compiled import library

MAP, POOLED, WEIGHTS = (1, 4, 5, 2, 8), (1, 2, 3, 2, 8), (1, 4, 5, 2, 9)
GATE = {"x": rand(2, 4, 5, 12), "weight": rand(6, 1, 3, 3), "bias": rand(6), "act": "gelu"}
POOL = {"x": rand(2, 4, 5, 6), "grid": [2, 3], "act": "gelu"}
SCORES = {"q": rand(MAP), "k": rand(MAP), "window_size": 3}
SUM = {"weights": rand(WEIGHTS), "v": rand(MAP), "window_size": 3}
ATTENTION = {
    "q": rand(MAP),
    "k": rand(MAP),
    "v": rand(MAP),
    "k_pool": rand(POOLED),
    "v_pool": rand(POOLED),
    "scale": rand(2),
    "query_embedding": rand(2, 8),
    "window_bias": rand(2, 9),
    "pool_bias": rand(2, 6, 7),
    "pool_rows": arange(8).view(4, 2) % 6,  # each entry of the table is looked up
    "pool_columns": arange(15).view(5, 3) % 7,
    "positional_tokens": rand(2, 8, 9),
    "positional_bias": rand(2, 9),
    "window_size": 3,
    "length_scaled": True,
    "normalize": True,
}
TABLE = {
    "rows": rand(5),
    "columns": rand(4),
    "weight1": rand(6, 2),
    "bias1": rand(6),
    "weight2": rand(3, 6),
    "bias2": rand(3),
}
NORM = {"x": rand(3, 6), "y": rand(3, 6), "y_bias": rand(6), "weight": rand(6), "bias": rand(6), "eps": 1e-5}
CALLS: dict[str, dict[str, Any]] = {
    "depthwise_gate": GATE,
    "depthwise_gate_with_input_bias": GATE | {"input_bias": rand(12)},
    "depthwise_gate_backward": GATE | {"grad": rand(2, 4, 5, 6), "wanted": 7},
    "activate_and_pool": POOL,
    "activate_and_pool_with_input_bias": POOL | {"input_bias": rand(6)},
    "activate_and_pool_backward": {"grad": rand(2, 2, 3, 6), "x": rand(2, 4, 5, 6), "act": "gelu"},
    "window_scores": SCORES,
    "window_scores_backward": SCORES | {"grad": rand(WEIGHTS), "wanted": 3},
    "window_sum": SUM,
    "window_sum_backward": SUM | {"grad": rand(MAP), "wanted": 3},
    "aggregated_attention": ATTENTION,
    "aggregated_attention_with_input_bias": ATTENTION | {"input_bias": rand(3, 2, 8)},
    "aggregated_attention_backward": ATTENTION
    | {"grad": rand(MAP), "out": rand(MAP), "lse": rand(MAP[:-1]), "wanted": 0b1100111111111},
    "log_cpb_table": TABLE,
    "log_cpb_table_backward": TABLE | {"grad": rand(3, 5, 4), "wanted": 15},
    "add_layer_norm": NORM,
    "add_layer_norm_": NORM,
}
NUMBERS = {
    "window_size": [0, -1, 2, 2**31 + 1, 2**32 + 3, 2**62 + 1, 2**63 - 1, -(2**63)],
    "act": ["", "gelu "],
    "grid": [[], [2], [2, 3, 4], [0, 3], [-1, 3], [2**62, 2**62], [2**40, 1]],
    "wanted": [0, -1, 1 << 9, 1 << 62],
}
# Other sizes are right where nothing contradicts them, and so is whatever is not read.
ACCEPTED = {
    ("activate_and_pool", "x"),
    ("window_sum", "v"),
    ("log_cpb_table", "rows"),
    ("log_cpb_table", "columns"),
    ("log_cpb_table_backward", "bias2"),
    ("aggregated_attention_backward", "out"),
    *product(CALLS, ["wanted"]),
}


def wrong(name: str, value: object) -> list:
    if not isinstance(value, Tensor):
        return NUMBERS.get(name, [])
    of_another_kind = [value.bool(), value.to(torch.complex64), torch.zeros(()), torch.zeros(0), None]
    of_another_shape = [value[..., :-1], value[None], value[0], value[..., None]]
    return [*of_another_kind, *of_another_shape, *([] if value.is_floating_point() else [value - 100, value + 7])]


def main() -> None:
    for compiled in (False, True):
        if compiled and (reason := library.why_not("cpu")) is not None:
            sys.exit(reason)
        for op, arguments in CALLS.items():
            for name, value in arguments.items():
                for i, other in enumerate(wrong(name, value)):
                    print(op, name, i, "compiled" if compiled else "by its definition", file=sys.stderr, flush=True)
                    try:
                        getattr(torch.ops.foveal, op)(**arguments | {name: other})
                    except Exception:
                        continue
                    if compiled and other is not None and (op, name) not in ACCEPTED:
                        print(f"{op} takes {name} number {i}")


if __name__ == "__main__":
    main()
