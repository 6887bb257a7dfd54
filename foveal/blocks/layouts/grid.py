"""The grid behind a row of tokens: known by the patch embedding, or noted where a map passes. Never guessed."""

from typing import Any, Protocol

from timm.layers import Format
from torch import Tensor, nn

from foveal.blocks._checks import Grid
from foveal.ops.tracing import shape_of


class HasGrid(Protocol):
    """Anything that knows the grid (rows, columns) of the tokens that are on their way; None where it does not yet."""

    @property
    def grid_size(self) -> Grid | None: ...


class PatchGrid:
    """The grid of a patch embedding of one image size, read whenever it is asked for."""

    def __init__(self, patch_embed: nn.Module):
        self.patch_embed: Any = patch_embed

    @property
    def grid_size(self) -> Grid:
        return self.patch_embed.grid_size


class CarriedGrid:
    """The grid of the last map that left a module, shared by all that see its cells as tokens.

    The grid is noted in passing, so tokens must be read before another map passes. Two threads must not share a model,
    and a model that recomputes in backward (gradient checkpointing) needs its backward before an input of another
    grid. A grid that does not fit the tokens raises.

    Example:
        >>> grid = CarriedGrid()
        >>> grid.follow(model.patch_embed, "NHWC")
        >>> model.blocks[0].mlp = Tokens(ConvGLU(384), grid, num_prefix_tokens=1)
    """

    # The hook is a bound method, so that a deep copy of the model notes into its own copy of this.

    def __init__(self) -> None:
        self.grid_size: Grid | None = None

    def follow(self, module: nn.Module, output_fmt: str) -> None:
        """Note the grid of every map that leaves ``module``, in the format "NHWC" or "NCHW"."""
        if output_fmt not in ("NHWC", "NCHW"):
            raise ValueError(f"output_fmt must be 'NHWC' or 'NCHW', got {output_fmt!r}")
        module.register_forward_hook(self._note_nhwc if output_fmt == "NHWC" else self._note_nchw)

    def _note_nhwc(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        _, height, width, _ = shape_of(output)
        self.grid_size = height, width

    def _note_nchw(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        _, _, height, width = shape_of(output)
        self.grid_size = height, width

    def __reduce__(self) -> tuple:
        return CarriedGrid, ()


def map_format(patch_embed: Any) -> str | None:
    """In which format one of timm's patch embeddings returns maps; None where it returns tokens of one image size.

    Raises:
        ValueError: the module is no such embedding, or takes any size and yet returns tokens.
    """
    flatten = getattr(patch_embed, "flatten", None)
    output_fmt = getattr(patch_embed, "output_fmt", None)
    if flatten is False and output_fmt in (Format.NHWC, Format.NCHW):
        return output_fmt.value
    if flatten and getattr(patch_embed, "strict_img_size", False) and patch_embed.grid_size is not None:
        return None
    raise ValueError(
        f"the grid of the tokens of {type(patch_embed).__name__} is unknown: it is neither an embedding of one "
        "declared image size nor one that returns maps (dynamic_img_size=True makes a ViT's return maps)"
    )


def grid_of(patch_embed: Any) -> PatchGrid | CarriedGrid:
    """The grid behind the tokens of one of timm's patch embeddings, to be shared by all the adapters of a model.

    Raises:
        ValueError: the grid is unknown, see :func:`map_format`.
    """
    output_fmt = map_format(patch_embed)
    if output_fmt is None:
        return PatchGrid(patch_embed)
    grid = CarriedGrid()
    grid.follow(patch_embed, output_fmt)
    return grid
