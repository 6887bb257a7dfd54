"""The example of a YOLO-style neck."""

import pytest
import torch

from foveal.blocks import AggregatedAttention, ConvGLU
from foveal.blocks.layouts import ChannelsFirst
from tests.examples.running import load, run

CHANNELS = [24, 48, 96]


def maps(rows=10, columns=14):
    return [torch.randn(2, c, -(-rows >> i), -(-columns >> i)) for i, c in enumerate(CHANNELS)]


def test_prints_a_table():
    out, _ = run("yolo_neck.py", "--size", "64x96", "--width", "32", "--backbone", "resnet18")
    lines = out.splitlines()
    assert len(lines) == 5
    assert lines[1].startswith("as it is")
    assert all(line.endswith("32 x 8 x 12, 32 x 4 x 6, 32 x 2 x 3") for line in lines[1:])


@pytest.mark.parametrize("way", ["as it is", "ConvGLU as parts", "ConvGLU fuses", "AggregatedAttention, then ConvGLU"])
def test_every_way_trains_and_keeps_the_sizes(way):
    example = load("yolo_neck")
    neck = example.build(way, CHANNELS, 32).train()
    out = neck(maps())
    assert [tuple(x.shape[1:]) for x in out] == [(32, 10, 14), (32, 5, 7), (32, 3, 4)]
    sum(x.square().sum() for x in out).backward()
    assert all(p.grad is not None for p in neck.parameters())


def test_blocks_are_where_they_should_be():
    example = load("yolo_neck")
    part = example.build("AggregatedAttention, then ConvGLU", CHANNELS, 32).up[1].parts
    assert [type(adapter.block[1]) for adapter in part] == [AggregatedAttention, ConvGLU]
    fuse = example.build("ConvGLU fuses", CHANNELS, 32).down[0].fuse
    assert isinstance(fuse, ChannelsFirst)
    assert (fuse.block.fc1.in_features, fuse.block.fc2.out_features) == (64, 32)
    x = torch.randn(1, 64, 5, 6)
    assert torch.equal(fuse(x), fuse.block(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--size", "64"), "expected HEIGHTxWIDTH"),
        (("--width", "40"), "expected a positive multiple of 32"),
        (("--backbone", "no_such_net"), "--backbone: Unknown model"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    _, err = run("yolo_neck.py", *arguments, code=2)
    assert message in err
