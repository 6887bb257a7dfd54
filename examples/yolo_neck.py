"""A YOLO-style neck of plain (B, C, H, W) convolutions, and the same neck with foveal's blocks swapped in.

    python examples/yolo_neck.py
    python examples/yolo_neck.py --backbone resnet18 --size 480x640 --width 128

It prints, for the neck as it is and for each way of swapping, parameters, multiply-adds and the maps it returns.
"""

import argparse
from collections.abc import Callable
from functools import partial

import timm
import torch
from torch import Tensor, nn

import foveal
from common.arguments import image_size
from foveal.analysis import count_flops, count_parameters
from foveal.blocks import AggregatedAttention, ConvGLU
from foveal.blocks.layouts import ChannelsFirst


def convolution(in_channels: int, out_channels: int, kernel_size: int = 1, stride: int = 1) -> nn.Sequential:
    padding = kernel_size // 2
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.SiLU(),
    )


class C2f(nn.Module):
    """Half of the channels go through a row of residual parts; all that they return is fused.

    ``(B, in_channels, H, W)`` to ``(B, out_channels, H, W)``.
    """

    def __init__(self, in_channels: int, out_channels: int, depth: int = 2):
        super().__init__()
        width = out_channels // 2
        self.enter = convolution(in_channels, 2 * width)
        self.parts = nn.ModuleList(
            nn.Sequential(convolution(width, width, 3), convolution(width, width, 3)) for _ in range(depth)
        )
        self.fuse = convolution((2 + depth) * width, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        maps = list(self.enter(x).chunk(2, dim=1))
        for part in self.parts:
            maps.append(maps[-1] + part(maps[-1]))
        return self.fuse(torch.cat(maps, dim=1))


class Neck(nn.Module):
    """Maps of several strides, fine to coarse, exchange what they know: down the pyramid, then up again."""

    def __init__(self, in_channels: list[int], width: int):
        super().__init__()
        self.enter = nn.ModuleList(convolution(channels, width) for channels in in_channels)
        levels = len(in_channels) - 1
        self.down = nn.ModuleList(C2f(2 * width, width) for _ in range(levels))
        self.stride = nn.ModuleList(convolution(width, width, 3, stride=2) for _ in range(levels))
        self.up = nn.ModuleList(C2f(2 * width, width) for _ in range(levels))

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        maps = [enter(x) for enter, x in zip(self.enter, maps, strict=True)]
        for i in reversed(range(len(self.down))):
            coarse = nn.functional.interpolate(maps[i + 1], maps[i].shape[2:])
            maps[i] = self.down[i](torch.cat((maps[i], coarse), dim=1))
        for i in range(len(self.up)):
            fine = self.stride[i](maps[i])
            maps[i + 1] = self.up[i](torch.cat((maps[i + 1], fine), dim=1))
        return maps


def normed(block: Callable[[int], nn.Module]) -> Callable[[int], nn.Module]:
    """A block after a LayerNorm; both take channels last, so that they can stand in a row."""
    return lambda dim: nn.Sequential(nn.LayerNorm(dim), block(dim))


def attention(dim: int) -> nn.Module:
    return AggregatedAttention(dim, num_heads=dim // 16, pool_ratio=2)


# What takes the place of what. Parts keep their width; what fuses them turns twice the width into the width.
WAYS = {
    "as it is": {},
    "ConvGLU as parts": {"*.*.parts.*": normed(ConvGLU)},
    "ConvGLU fuses": {"*.*.fuse": partial(ConvGLU, hidden_dim=64)},
    "AggregatedAttention, then ConvGLU": {"*.*.parts.0": normed(attention), "*.*.parts.1": normed(ConvGLU)},
}


def describe(neck: Neck, maps: list[Tensor]) -> tuple[str, str, str]:
    with torch.no_grad():
        shapes = ", ".join(" x ".join(map(str, x.shape[1:])) for x in neck(maps))
    return f"{count_parameters(neck) / 1e6:.2f} M", f"{count_flops(neck, maps) / 2e9:.2f} G", shapes


def build(way: str, in_channels: list[int], width: int) -> Neck:
    neck = Neck(in_channels, width)
    if WAYS[way]:
        foveal.swap(neck, WAYS[way], adapter=ChannelsFirst)
    return neck.eval()


def neck_width(text: str) -> int:
    if not text.isdecimal() or int(text) == 0 or int(text) % 32:
        raise argparse.ArgumentTypeError(f"expected a positive multiple of 32, for heads of 16 channels, got {text!r}")
    return int(text)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="transnext_micro", help="a model of timm; default: %(default)s")
    parser.add_argument(
        "--size", type=image_size, default=(256, 320), help="of the image, HEIGHTxWIDTH; default: 256x320"
    )
    parser.add_argument("--width", type=neck_width, default=96, help="channels of the neck; default: %(default)s")
    args = parser.parse_args(argv)
    try:
        backbone = timm.create_model(args.backbone, features_only=True, out_indices=(-3, -2, -1)).eval()
    except RuntimeError as error:
        parser.error(f"--backbone: {error}")
    with torch.no_grad():
        maps = backbone(torch.randn(1, 3, *args.size))
    rows = [("neck", "parameters", "multiply-adds", "maps")]
    rows += [(way, *describe(build(way, backbone.feature_info.channels(), args.width), maps)) for way in WAYS]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


if __name__ == "__main__":
    main()
