"""A stage in inference on the CPU: its blocks read one after the other, every sum joined to the norm after it."""

from typing import Any

from torch import Tensor, nn

from foveal.blocks._plain import is_idle, is_untouched
from foveal.blocks.inference import Branch, add, add_and_normalize, read
from foveal.models.block import Block

_FORWARD = Block.forward  # the one that is read here, should somebody replace it


def _is_plain(block: nn.Module) -> bool:
    return type(block) is Block and Block.forward is _FORWARD and is_untouched(block)


def is_plain_sequence(blocks: nn.Module) -> bool:
    """Whether calling it runs its modules one after the other, and nothing besides."""
    return type(blocks) is nn.Sequential and is_untouched(blocks)


def read_stage(stage: Any, x: Tensor) -> Tensor:
    """``norm(blocks(downsample(x)))`` of a stage, the numbers of its forward."""
    x = read(stage.downsample, x).total()
    if not is_plain_sequence(stage.blocks):
        return stage.norm(stage.blocks(x))
    branch, owned = None, False  # what is not added yet; whether nobody else holds x
    for block in stage.blocks:
        if not (_is_plain(block) and is_idle(block.drop_path, x)):
            x, branch, owned = block(add(x, branch)), None, False
            continue
        for norm, part, scale in (
            (block.norm1, block.mixer, block.scale1),
            (block.norm2, block.mlp, block.scale2),
        ):
            x, normed, owned = add_and_normalize(x, branch, norm, owned)
            branch = read(part, normed)
            if not is_idle(scale, x):
                branch = Branch(scale(branch.total()))
    return add_and_normalize(x, branch, stage.norm, owned)[1]
