"""Compose a backbone of one's own: stages from declarations, mixers from foveal and from here.

    python examples/custom_backbone.py
    python examples/custom_backbone.py --sizes 256x256 480x640

It prints, for every stage, its mixers, its parameters, the FLOPs of an image and the size of its feature map.
"""

import argparse
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.arguments import image_size
from foveal.analysis import count_flops, count_parameters, profile_blocks
from foveal.blocks import AggregatedAttention, ConvGLU, LengthScaledCosineAttention
from foveal.models import Backbone, Stage
from foveal.ops import window_scores, window_sum


class SlidingWindowAttention(nn.Module):
    """Attention of every cell to the k x k cells around it, ``(B, H, W, C)`` to the same shape.

    All that a mixer needs: a callable of the width, and a forward that keeps the shape at any H and W.
    """

    def __init__(self, dim: int, num_heads: int, window_size: int = 5):
        super().__init__()
        self.num_heads, self.window_size = num_heads, window_size
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(3)  # each (B, H, W, heads, d)
        scores = window_scores(q * self.scale, k, self.window_size)  # (B, H, W, heads, k * k), -inf outside the map
        return self.proj(window_sum(scores.softmax(dim=-1), v, self.window_size).flatten(3))


class Pooling(nn.Module):
    """PoolFormer's mixer, without a parameter: what the mean of the 3 x 3 cells around adds to a cell."""

    def __init__(self, dim: int):
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        mean = F.avg_pool2d(x.permute(0, 3, 1, 2), 3, stride=1, padding=1, count_include_pad=False)
        return mean.permute(0, 2, 3, 1) - x


def build(num_classes: int = 1000) -> Backbone:
    """Four stages that go from cheap and local to global. A list of mixers gives each block its own."""
    window = partial(SlidingWindowAttention, num_heads=6)
    foveal = partial(AggregatedAttention, num_heads=6, pool_ratio=2)
    return Backbone(
        [
            Stage(dim=48, depth=2, mixer=Pooling, mlp=partial(ConvGLU, hidden_dim=128)),
            Stage(dim=96, depth=2, mixer=partial(AggregatedAttention, num_heads=4, pool_ratio=4), mlp=ConvGLU),
            Stage(dim=144, depth=6, mixer=[window, window, foveal] * 2, mlp=ConvGLU, layer_scale=1e-2),
            Stage(dim=288, depth=2, mixer=partial(LengthScaledCosineAttention, num_heads=12), mlp=ConvGLU),
        ],
        num_classes=num_classes,
        pretrain_size=224,
    )


def summarize(model: Backbone, sizes: list[tuple[int, int]]) -> str:
    """A table with a line for each stage, the head and the whole model."""
    images = [torch.randn(1, model.in_chans, *size) for size in sizes]
    with torch.inference_mode():
        maps = [model.forward_intermediates(image, intermediates_only=True) for image in images]
    *stages, head = profile_blocks(model, images[0], [*(f"stages.{i}" for i in range(len(model.stages))), "head"])
    shapes = [[" x ".join(map(str, features.shape[1:])) for features in stage] for stage in zip(*maps, strict=True)]

    rows = [("part", "mixers", "parameters", f"MFLOP at {by(sizes[0])}", *(f"map of {by(size)}" for size in sizes))]
    for i, stage in enumerate(model.stages):
        mixers = list(dict.fromkeys(type(block.mixer).__name__ for block in stage.blocks))
        rows.append((f"stage {i}", " + ".join(mixers), *numbers(stages[i].parameters, stages[i].flops), *shapes[i]))
    rows.append(("head", "", *numbers(head.parameters, head.flops), *["-"] * len(sizes)))
    rows.append(("all", "", *numbers(count_parameters(model), count_flops(model, images[0])), *["-"] * len(sizes)))

    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        left, right = zip(row[:2], widths[:2], strict=True), zip(row[2:], widths[2:], strict=True)
        lines.append("  ".join([f"{x:<{width}}" for x, width in left] + [f"{x:>{width}}" for x, width in right]))
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)


def numbers(parameters: int, flops: int) -> tuple[str, str]:
    return f"{parameters:,}", f"{flops / 1e6:,.1f}"


def by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sizes",
        nargs="+",
        type=image_size,
        default=[(224, 224), (160, 256)],
        metavar="HEIGHTxWIDTH",
        help="image sizes whose feature maps to show, the first also for the FLOPs; default: 224x224 160x256",
    )
    args = parser.parse_args(argv)
    print(summarize(build().eval(), args.sizes))


if __name__ == "__main__":
    main()
