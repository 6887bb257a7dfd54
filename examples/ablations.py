"""The paper's ablations as declarations: every row's parameters and FLOPs, beside the figures that the paper prints.

    python examples/ablations.py                      # all tables, about a minute
    python examples/ablations.py --tables 2 9 --output ablations.json

A row is a backbone of four stages. What sets it apart from the next row is an argument of a block. FLOPs are
multiply-adds by the paper's rule (foveal.analysis.count_multiply_adds), counted on the meta device: no weight is drawn,
no image computed. A figure matches where it equals the printed one rounded or, as the paper does now and then, cut off.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import timm
import torch
from torch import nn
from tqdm import tqdm

from foveal.analysis import complexity, count_flops, count_multiply_adds, count_parameters
from foveal.blocks import (
    GLU,
    AggregatedAttention,
    ConvFFN,
    ConvGLU,
    ConvGLUType1,
    ConvGLUType2,
    ConvGLUType3,
    LengthScaledCosineAttention,
    PixelFocusedAttention,
    SpatialReductionAttention,
)
from foveal.models import Backbone, Stage

MICRO, TINY, PICO = (48, 96, 192, 384), (72, 144, 288, 576), (24, 48, 96, 192)  # widths of the stages
AAAM = (8, 4, 2, None)  # pool ratios; None makes a stage's mixer global attention
Factory = Callable[..., nn.Module]


def backbone(dims: Sequence[int], mixers: Sequence[Factory], mlp: type[nn.Module], depths=(2, 2, 15, 2), size=224):
    """Four stages of MLP ratios 8, 8, 4, 4. A gated MLP gets two thirds of the width, and so keeps its parameters."""
    stages = []
    for dim, depth, mixer, ratio in zip(dims, depths, mixers, (8, 8, 4, 4), strict=True):
        width = int(dim * ratio * 2 / 3) if issubclass(mlp, GLU) else dim * ratio
        stages.append(Stage(dim=dim, depth=depth, mixer=mixer, mlp=partial(mlp, hidden_dim=width)))
    return Backbone(stages, pretrain_size=size, device="meta")


def pvt(dims: Sequence[int], head_dim: int, mlp: type[nn.Module]) -> Backbone:
    """PVTv2's attention in every stage, to a map that a strided convolution reduces."""
    mixers = [
        partial(SpatialReductionAttention, num_heads=dim // head_dim, sr_ratio=ratio)
        for dim, ratio in zip(dims, (8, 4, 2, 1), strict=True)
    ]
    return backbone(dims, mixers, mlp)


def transnext(
    dims: Sequence[int],
    *,
    attention: Factory = AggregatedAttention,
    mlp: type[nn.Module] = ConvGLU,
    pool_ratios: Sequence[int | None] = AAAM,
    query_embedding: bool = True,
    global_bias: str | None = "log-cpb",
    depths: Sequence[int] = (2, 2, 15, 2),
    size: int = 224,
    **switches,
) -> Backbone:
    """TransNeXt's mixers, with heads of 24 channels. The other switches are those of PixelFocusedAttention."""
    pooled = partial(attention, query_embedding=query_embedding, **switches)
    cosine = partial(LengthScaledCosineAttention, query_embedding=query_embedding, position_bias=global_bias)
    mixers = [
        partial(cosine, num_heads=dim // 24)
        if ratio is None
        else partial(pooled, num_heads=dim // 24, pool_ratio=ratio)
        for dim, ratio in zip(dims, pool_ratios, strict=True)
    ]
    return backbone(dims, mixers, mlp, depths, size)


registered = partial(timm.create_model, device="meta")
roadmap = partial(  # equations 1-5, with the cosine and the length scale of equation 9
    transnext,
    MICRO,
    attention=partial(PixelFocusedAttention, cosine=True, length_scaled=True),
    query_embedding=False,
)
pico = partial(transnext, PICO, depths=(2, 2, 6, 2))
STAND_IN = "its widths are not published, ours are transnext_pico's"


@dataclass(frozen=True)
class Row:
    """A backbone, and what the paper prints for it: millions of parameters, billions of multiply-adds."""

    name: str
    build: Callable[[], nn.Module]
    parameters: str
    flops: str
    size: int = 224
    explanation: str = ""  # of a figure that differs


@dataclass(frozen=True)
class Table:
    title: str
    rows: Sequence[Row]


TABLES = {
    "variants": Table(
        "The variants, at 224 x 224",
        [
            Row("Micro", partial(registered, "transnext_micro"), "12.8", "2.7"),
            Row("Tiny", partial(registered, "transnext_tiny"), "28.2", "5.7"),
            Row("Small", partial(registered, "transnext_small"), "49.7", "10.3"),
            Row("Base", partial(registered, "transnext_base"), "89.7", "18.4"),
        ],
    ),
    "2": Table(
        "Table 2: the roadmap from PVTv2 to TransNeXt, in Micro's widths and depths",
        [
            Row("2 PVTv2, heads of 48 channels", partial(pvt, MICRO, 48, ConvFFN), "14.9", "2.3"),
            Row("3 heads of 24 channels", partial(pvt, MICRO, 24, ConvFFN), "14.9", "2.3"),
            Row("4 ConvFFN becomes GLU", partial(pvt, MICRO, 24, GLU), "14.8", "2.2"),
            Row("5 GLU becomes ConvGLU", partial(pvt, MICRO, 24, ConvGLU), "14.9", "2.2"),
            Row("6 pixel-focused attention", roadmap, "12.8", "2.7"),
            Row("7 + positional attention", partial(roadmap, positional_attention=True), "12.8", "2.7"),
            Row("8 + query embedding: Micro", partial(transnext, MICRO), "12.8", "2.7"),
        ],
    ),
    "6": Table(
        "Table 6: position biases of Tiny",
        [
            Row(
                "none",
                partial(transnext, TINY, window_bias=None, pool_bias=None, global_bias=None),
                "28.1",
                "5.6",
            ),
            Row("window: log-CPB", partial(transnext, TINY, window_bias="log-cpb"), "28.2", "5.7"),
            Row("window: q.T alone", partial(transnext, TINY, window_bias=None), "28.2", "5.7"),
            Row("pool: learned", partial(transnext, TINY, pool_bias="learned", pool_grid=(7, 7)), "28.1", "5.6"),
            Row("window: learned, pool: log-CPB", partial(transnext, TINY), "28.2", "5.7"),
        ],
    ),
    "7": Table(
        "Table 7: where the convolution of a GLU stands, on a small model",
        [
            Row("ConvGLU", pico, "2.3", "0.5", explanation=STAND_IN),
            Row("type 1", partial(pico, mlp=ConvGLUType1), "2.3", "0.5", explanation=STAND_IN),
            Row("type 2", partial(pico, mlp=ConvGLUType2), "2.3", "0.5", explanation=STAND_IN),
            Row("type 3", partial(pico, mlp=ConvGLUType3), "2.3", "0.5", explanation=STAND_IN),
        ],
    ),
    "8": Table(
        "Table 8: the side of the window, on a small model",
        [
            Row(f"{k} x {k}", partial(registered, "transnext_pico", window_size=k), "2.3", flops, explanation=STAND_IN)
            for k, flops in ((3, "0.50"), (5, "0.52"), (7, "0.54"), (9, "0.57"))
        ],
    ),
    "9": Table(
        "Table 9: aggregated (A) and global (M) attention in the stages of Micro",
        [
            Row("A-A-A-M", partial(transnext, MICRO), "12.8", "2.7"),
            Row("A-A-M-M", partial(transnext, MICRO, pool_ratios=(8, 4, None, None)), "12.2", "2.7"),
            Row("A-M-M-M", partial(transnext, MICRO, pool_ratios=(8, None, None, None)), "12.2", "2.9"),
            Row("M-M-M-M", partial(transnext, MICRO, pool_ratios=(None,) * 4), "12.2", "4.7"),
            Row("A-A-A-A, 256", partial(transnext, MICRO, pool_ratios=(16, 8, 4, 2), size=256), "13.1", "3.3", 256),
        ],
    ),
}


ALL = (*TABLES, "complexity")


def matches(value: float, printed: str) -> bool:
    """Whether a figure rounds to the printed one, or is it when cut off."""
    digits = len(printed.partition(".")[2])
    return printed in (f"{value:.{digits}f}", f"{math.floor(value * 10**digits) / 10**digits:.{digits}f}")


def measure(row: Row) -> dict:
    """A row's figures, the paper's, and what to say of them."""
    model = row.build()
    parameters = count_parameters(model)
    flops = count_multiply_adds(model, torch.empty(1, 3, row.size, row.size, device="meta"))
    pairs = {"parameters": (parameters / 1e6, row.parameters), "FLOPs": (flops / 1e9, row.flops)}
    differing = [name for name, (ours, printed) in pairs.items() if not matches(ours, printed)]
    return {
        "name": row.name,
        "parameters": parameters,
        "multiply_adds": flops,
        "paper": {"parameters (M)": row.parameters, "FLOPs (G)": row.flops},
        "matches": not differing,
        "explanation": f"{' and '.join(differing)} differ: {row.explanation}" if differing and row.explanation else "",
    }


def print_row(result: dict) -> None:
    paper = result["paper"]
    verdict = "matches" if result["matches"] else result["explanation"] or "DIFFERS"
    tqdm.write(
        f"{result['name']:<32}{result['parameters'] / 1e6:>10.3f}{paper['parameters (M)']:>7}"
        f"{result['multiply_adds'] / 1e9:>11.3f}{paper['FLOPs (G)']:>7}  {verdict}"
    )


def closed_forms(sides: Sequence[int] = (56, 96, 200, 512), dim: int = 72) -> Iterator[dict]:
    """The paper's formulas beside the counter, on maps like those of Tiny's first stage, in normal and linear mode."""
    heads, hidden = dim // 24, int(dim * 8 * 2 / 3)
    for side in sides:
        x = torch.empty(1, side, side, dim, device="meta")
        for mode, pool in (("normal", side // 8), ("linear", 7)):
            for name, formula, block in (
                ("eq. 15, pixel-focused", complexity.pixel_focused_attention, PixelFocusedAttention),
                ("eq. 16, aggregated", complexity.aggregated_attention, AggregatedAttention),
            ):
                attention = block(dim, heads, pool_grid=pool, pool_bias=None, device="meta")
                yield closed_form(f"{name}, {mode} mode", side, formula(side, pool, dim), attention, x)
        yield closed_form(
            "ConvGLU", side, complexity.conv_glu(side, dim, hidden), ConvGLU(dim, hidden, device="meta"), x
        )


def closed_form(name: str, side: int, formula: int, block: nn.Module, x: torch.Tensor) -> dict:
    counted = count_flops(block, x) // 2
    return {"name": name, "side": side, "formula": formula, "counted": counted, "matches": formula == counted}


def print_closed_form(result: dict) -> None:
    verdict = "matches" if result["matches"] else "DIFFERS"
    tqdm.write(f"{result['name']:<36}{result['side']:>5}{result['formula']:>18,}{result['counted']:>18,}  {verdict}")


def main(argv: list[str] | None = None) -> int | str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tables", nargs="+", choices=ALL, default=ALL, metavar="TABLE", help=f"of {', '.join(ALL)}; default: all"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the figures as JSON, too")
    args = parser.parse_args(argv)
    results: dict[str, list[dict]] = {}
    for key in args.tables:
        results[key] = []
        if key == "complexity":
            print(f"\nMultiply-adds of a block of 72 channels\n{'':<36}{'side':>5}{'formula':>18}{'counted':>18}")
            rows, count, show = closed_forms(), None, print_closed_form
        else:
            print(f"\n{TABLES[key].title}\n{'':<32}{'params (M)':>10}{'paper':>7}{'FLOPs (G)':>11}{'paper':>7}")
            rows, count, show = map(measure, TABLES[key].rows), len(TABLES[key].rows), print_row
        for result in tqdm(rows, desc=f"table {key}", total=count, leave=False):
            show(result)
            results[key].append(result)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(results, indent=1) + "\n")
    every = [result for rows in results.values() for result in rows]
    explained = [result for result in every if result.get("explanation")]
    wrong = [result["name"] for result in every if not result["matches"] and not result.get("explanation")]
    print(f"\n{len(every)} rows: {len(every) - len(explained) - len(wrong)} match, {len(explained)} are explained")
    return f"ablations.py: rows that differ from the paper: {', '.join(wrong)}" if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
