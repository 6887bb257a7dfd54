"""Op level: each op at the sizes of a model's stages, by backend, beside a copy of the bytes that it must move."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from benchmarks import flex, measure
from foveal import ops
from foveal.blocks import LogCPB


@dataclass(frozen=True)
class StageShape:
    """What one stage of TransNeXt-Tiny asks of the ops, at an image size."""

    name: str
    grid: tuple[int, int]
    heads: int
    hidden: int
    pool: tuple[int, int]

    @property
    def dim(self) -> int:
        return 24 * self.heads


STAGES = (
    StageShape("stage 1", (56, 56), 3, 384, (7, 7)),
    StageShape("stage 2", (28, 28), 6, 768, (7, 7)),
    StageShape("stage 3", (14, 14), 12, 768, (7, 7)),
    StageShape("stage 1 at 800 x 1333", (200, 334), 3, 384, (25, 41)),
)


@dataclass
class Operation:
    """A call of an op, its inputs, and how many values it must read and write, forward and backward."""

    name: str
    call: Callable[[], Tensor]
    inputs: list[Tensor]
    forward_values: int
    backward_values: int
    by_flex: Callable[[], Callable[[], Tensor]] | None = None  # makes the same call by FlexAttention


def operations(stage: StageShape, batch: int, dtype: torch.dtype, device: str, training: bool) -> list[Operation]:
    def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype).requires_grad_(training)

    (height, width), (rows, columns), heads, hidden = stage.grid, stage.pool, stage.heads, stage.hidden
    x = draw(batch, height, width, 2 * hidden)
    weight, bias = draw(hidden, 1, 3, 3, dtype=torch.float32), draw(hidden, dtype=torch.float32)
    pooled = draw(batch, height, width, stage.dim)
    qkv, kv = draw(batch, height, width, 3 * stage.dim), draw(batch, rows, columns, 2 * stage.dim)
    parameters = {
        "scale": draw(heads, dtype=torch.float32),
        "query_embedding": draw(heads, 24, dtype=torch.float32),
        "window_bias": draw(heads, 9, dtype=torch.float32),
        "positional_tokens": draw(heads, 24, 9, dtype=torch.float32),
        "positional_bias": draw(heads, 9, dtype=torch.float32),
    }
    with torch.no_grad():
        table, row_index, column_index = LogCPB(heads, device=device)(stage.grid, stage.pool, (56, 56))
    table.requires_grad_(training)

    def attend(function: Callable[..., Tensor] = ops.aggregated_attention, **options) -> Tensor:
        maps, pools = qkv.unflatten(-1, (3, heads, 24)).unbind(3), kv.unflatten(-1, (2, heads, 24)).unbind(3)
        pool_bias = ops.PositionBias(table, row_index, column_index)
        options = options or {"length_scaled": True, "normalize": True}
        return function(*maps, *pools, pool_bias=pool_bias, window_size=3, **parameters, **options)

    def attend_by_flex() -> Callable[[], Tensor]:
        mask = flex.window_mask(stage.grid, rows * columns, 3, x.device)
        function = flex.aggregated_attention if device == "cpu" else torch.compile(flex.aggregated_attention)
        return partial(attend, function, block_mask=mask)

    cells, pool_cells = batch * height * width, batch * rows * columns
    maps, pools = cells * stage.dim, pool_cells * stage.dim
    attention = [qkv, kv, table, *parameters.values()]

    def gate() -> Tensor:
        return ops.depthwise_gate(x, weight, bias)

    def pool() -> Tensor:
        return ops.activate_and_pool(pooled, stage.pool)

    return [
        Operation("depthwise_gate", gate, [x, weight, bias], 3 * cells * hidden, 5 * cells * hidden),
        Operation("activate_and_pool", pool, [pooled], maps + pools, 2 * maps + pools),
        Operation(
            "aggregated_attention", attend, attention, 4 * maps + 2 * pools, 8 * maps + 4 * pools, attend_by_flex
        ),
    ]


def run(
    stage: StageShape, *, batch: int = 8, dtype: str = "float32", device: str = "cpu", training: bool, rounds: int
) -> list[dict]:
    """Each op of a stage by both backends, on a GPU by FlexAttention, and a copy of as many bytes: a row for each."""
    rows = []
    for operation in operations(stage, batch, getattr(torch, dtype), device, training):
        moved = operation.forward_values + (operation.backward_values if training else 0)
        moved *= operation.inputs[0].element_size()
        source = torch.ones(moved // 2, dtype=torch.uint8, device=device)  # a copy reads and writes
        target = torch.empty_like(source)
        steps = {"copy": lambda source=source, target=target: target.copy_(source)}
        for backend in ("auto", "reference"):
            steps[backend] = _step(operation, backend, training)
        peer: dict[str, object] = {}
        if operation.by_flex and device != "cpu":
            try:
                steps["flex"] = _step(replace(operation, call=operation.by_flex()), "auto", training)
                steps["flex"]()
            except Exception as error:
                peer["flex_failed"] = f"{type(error).__name__}: {error}"
                steps.pop("flex", None)
        mode = "forward + backward" if training else "forward"
        title = f"{operation.name}, {mode}, {dtype}, batch {batch}, {stage.name}, {device}"
        timings = measure.paired(steps, rounds=rounds, device=device, title=title)
        if "flex" in steps:
            peer["flex_milliseconds"] = 1e3 * timings["flex"].median
            peer["times_flex"] = timings["auto"].ratio_to(timings["flex"])
        rows.append(
            peer
            | {
                "level": "op",
                "title": title,
                "name": operation.name,
                "stage": stage.name,
                "device": device,
                "batch": batch,
                "dtype": dtype,
                "training": training,
                "milliseconds": 1e3 * timings["auto"].median,
                "reference_milliseconds": 1e3 * timings["reference"].median,
                "times_the_reference": timings["auto"].ratio_to(timings["reference"]),
                "copies_of_its_bytes": 1 / timings["auto"].ratio_to(timings["copy"]),
                "bytes": moved,
            }
        )
    return rows


def _step(operation: Operation, backend: str, training: bool) -> Callable[[], object]:
    def infer() -> Tensor:
        with torch.inference_mode(), ops.backend(backend):
            return operation.call()

    with torch.no_grad():
        upstream = torch.randn_like(operation.call())

    def train() -> object:
        with ops.backend(backend):
            return torch.autograd.grad(operation.call(), operation.inputs, upstream)

    return train if training else infer
