"""What the modules of timm's architectures see: where a block fits into them, and where it does not, and why."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from timm.models import (
    convnext,
    eva,
    hiera,
    inception_next,
    maxxvit,
    metaformer,
    naflexvit,
    pvt_v2,
    swin_transformer,
    swin_transformer_v2,
    vision_transformer,
    vision_transformer_sam,
)
from torch import nn

from foveal.blocks.layouts import CarriedGrid, ChannelsFirst, PatchGrid, SizedTokens, TokenMixer, Tokens
from foveal.blocks.layouts.grid import map_format
from foveal.models.hosts.replaced import widths_of
from foveal.models.hosts.whole_maps import check_windows, see_whole_maps

Adapter = Callable[[nn.Module], nn.Module]


def channels_last(block: nn.Module) -> nn.Module:
    """The adapter of networks whose maps are ``(B, H, W, C)`` as the blocks': none."""
    return block


@dataclass(frozen=True)
class Place:
    """How a block fits where a module is: its adapter, the width of the host, and what else changes in the host."""

    adapter: Adapter
    width: int | None = None
    prepare: Callable[[], None] = lambda: None


@dataclass
class Site:
    """A module of a model, the path to it, and the grids that the model carries so far."""

    model: nn.Module
    name: str
    grids: dict[int, CarriedGrid] = field(default_factory=dict)

    def __post_init__(self) -> None:
        owner, _, self.attribute = self.name.rpartition(".")
        self.owner: Any = self.model.get_submodule(owner)
        self.module: nn.Module = self.model.get_submodule(self.name)

    def ancestors(self) -> Iterator[Any]:
        """The modules around the owner, from the inside out."""
        path = self.name.split(".")[:-2]
        while path:
            yield self.model.get_submodule(".".join(path))
            path.pop()
        yield self.model

    def carried(self, module: nn.Module, output_fmt: str, adapter: Callable[..., nn.Module], **kwargs: Any) -> Place:
        """A place whose grid is noted where maps leave ``module``, once for all that it is carried to."""
        if id(module) in self.grids:
            return Place(partial(adapter, grid=self.grids[id(module)], **kwargs))
        grid = self.grids[id(module)] = CarriedGrid()
        return Place(partial(adapter, grid=grid, **kwargs), prepare=partial(grid.follow, module, output_fmt))


Places = dict[str, Callable[[Site], Place]]  # by the name of a block's part


def _embedded_tokens(site: Site, adapter: Callable[..., nn.Module] = Tokens) -> Place:
    """The tokens of a patch embedding, after prefix tokens."""
    host: Any = next((m for m in site.ancestors() if site.owner in getattr(m, "blocks", ())), site.model)
    if isinstance(host, naflexvit.NaFlexVit):
        raise ValueError("NaFlexVit packs images of different grids into one batch, and a block takes one grid a batch")
    if not hasattr(host, "patch_embed") or not hasattr(host, "num_prefix_tokens"):
        raise ValueError(f"the grid of the tokens in {type(host).__name__} is unknown: it has no patch embedding")
    if not isinstance(getattr(host, "patch_drop", None) or nn.Identity(), nn.Identity):
        raise ValueError("patch dropout leaves holes in the grid of the tokens (patch_drop_rate=0 has none)")
    kwargs = {"num_prefix_tokens": host.num_prefix_tokens}
    output_fmt = map_format(host.patch_embed)
    if output_fmt is None:
        return Place(partial(adapter, grid=PatchGrid(host.patch_embed), **kwargs))
    return site.carried(host.patch_embed, output_fmt, adapter, **kwargs)


def _embedded_mixer(site: Site) -> Place:
    return _embedded_tokens(site, TokenMixer)


def _flattened_after_norm(site: Site) -> Place:
    """The cells of the map that the block's first norm returns, as tokens."""
    return site.carried(site.owner.norm1, "NHWC", Tokens)


def _metaformer(site: Site) -> Place:
    stage = next(m for m in site.ancestors() if isinstance(m, metaformer.MetaFormerStage))
    return Place(ChannelsFirst) if stage.use_nchw else site.carried(stage.downsample, "NCHW", Tokens)


def _convnext_mlp(site: Site) -> Place:
    return Place(ChannelsFirst if site.owner.use_conv_mlp else channels_last)


def _same_size_convolution(site: Site) -> Place:
    if len(set(widths_of(site.module))) > 1:
        raise ValueError("this convolution changes the width of the map, and a mixer keeps it")
    return Place(ChannelsFirst)


def _windowed(adapter: Adapter) -> Callable[[Site], Place]:
    def place(site: Site) -> Place:
        check_windows(site.owner)
        return Place(adapter, prepare=partial(see_whole_maps, site.owner))

    return place


def _always(adapter: Adapter) -> Callable[[Site], Place]:
    return lambda site: Place(adapter)


def _never(reason: str) -> Callable[[Site], Place]:
    def refuse(site: Site) -> Place:
        raise ValueError(reason)

    return refuse


_ROTARY = _never("this attention is given rotary embeddings and masks, which foveal's mixers do not take")
_MASK_UNITS = _never("Hiera keeps its tokens in the order of mask units, which is no grid")
_VIT: Places = {"mlp": _embedded_tokens, "attn": _embedded_mixer}
_EVA: Places = {"mlp": _embedded_tokens, "attn": _ROTARY}
_SWIN: Places = {"mlp": _flattened_after_norm, "attn": _windowed(channels_last)}
_CONVNEXT: Places = {"mlp": _convnext_mlp, "conv_dw": _same_size_convolution}

PLACES: dict[type, Places] = {
    vision_transformer.Block: _VIT,
    vision_transformer.ResPostBlock: _VIT,
    vision_transformer_sam.Block: {"mlp": _flattened_after_norm},
    eva.EvaBlock: _EVA,
    eva.EvaBlockPostNorm: _EVA,
    swin_transformer.SwinTransformerBlock: _SWIN,
    swin_transformer_v2.SwinTransformerV2Block: _SWIN,
    pvt_v2.Block: {"mlp": _always(SizedTokens), "attn": _always(SizedTokens)},
    convnext.ConvNeXtBlock: _CONVNEXT,
    metaformer.MetaFormerBlock: {"mlp": _metaformer, "token_mixer": _metaformer},
    maxxvit.PartitionAttentionCl: {"mlp": _always(channels_last), "attn": _windowed(channels_last)},
    maxxvit.PartitionAttention2d: {"mlp": _always(ChannelsFirst), "attn": _windowed(ChannelsFirst)},
    maxxvit.TransformerBlock2d: {"mlp": _always(ChannelsFirst)},
    maxxvit.ConvNeXtBlock: _CONVNEXT,
    inception_next.MetaNeXtBlock: {"mlp": _always(ChannelsFirst), "token_mixer": _always(ChannelsFirst)},
    hiera.HieraBlock: {"mlp": _MASK_UNITS, "attn": _MASK_UNITS},
}


def _width(block: Any) -> int:
    """The width of a residual block, from its norm."""
    norm = next(getattr(block, name) for name in ("norm2", "norm1", "norm") if hasattr(block, name))
    return norm.weight.shape[0]


def find_place(site: Site) -> Place:
    """How a block fits at a site.

    Raises:
        ValueError: it does not, or the host is none that foveal knows; says why.
    """
    for kind in type(site.owner).__mro__:
        if site.attribute in PLACES.get(kind, ()):
            return replace(PLACES[kind][site.attribute](site), width=_width(site.owner))
    raise ValueError(
        f"foveal does not know what {site.attribute!r} of {type(site.owner).__module__}.{type(site.owner).__name__} "
        "sees; name the layout with adapter=, as ChannelsFirst for (B, C, H, W)"
    )
