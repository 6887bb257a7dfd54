"""swap: foveal's blocks in the place of modules of a model that exists already."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from foveal.blocks._factory import call, located
from foveal.blocks.layouts.adapter import Adapter
from foveal.models._dry_run import output_shape
from foveal.models.hosts.places import Place, Site, find_place
from foveal.models.hosts.replaced import arguments_of, check_no_hooks, widths_of

Factory = Callable[..., nn.Module]

_PROBE = 56, 112  # the grid on which a block shows what shape it returns; windows of 7 and 8 divide it


@dataclass(frozen=True)
class Replacement:
    """A module that was replaced: its name, what it was and is, and the parameters of both.

    ``no_weight_decay`` holds the names of new parameters that the paper's recipe exempts from weight decay, besides
    norms and biases.
    """

    name: str
    old: str
    new: str
    parameters_before: int
    parameters_after: int
    no_weight_decay: frozenset[str]


class Replacements(tuple[Replacement, ...]):
    """What :func:`swap` replaced; prints as a table."""

    @property
    def no_weight_decay(self) -> set[str]:
        """The names of new parameters that should not decay, to be added to the host's own ``no_weight_decay()``."""
        return {name for replacement in self for name in replacement.no_weight_decay}

    def __repr__(self) -> str:
        rows = [(r.name, f"{r.old} -> {r.new}", f"{r.parameters_before:,} -> {r.parameters_after:,}") for r in self]
        before, after = (sum(getattr(r, f"parameters_{when}") for r in self) for when in ("before", "after"))
        rows.append((f"{len(self)} modules", "parameters", f"{before:,} -> {after:,}"))
        first, second = (max(len(row[i]) for row in rows) for i in (0, 1))
        return "\n".join(f"{a:<{first}}  {b:<{second}}  {c}" for a, b, c in rows)


def swap(
    model: nn.Module, blocks: Mapping[str, Factory], *, adapter: Callable[[nn.Module], nn.Module] | None = None
) -> Replacements:
    """Replace modules of a model by foveal's blocks, in place.

    In the architectures of timm that foveal knows, each block gets the adapter of what it sees there: maps, channels
    first or last, tokens with their prefix tokens and grid, windows (then the block sees the whole map instead).

    A block is called with the width and with those of hidden_dim (so that the parameters stay about the same), out_dim,
    num_heads, drop, attn_drop, proj_drop, device and dtype that its signature names, as the replaced module has them.
    In networks that foveal does not know, the width is read off a dry run of the replaced module alone.
    Training mode stays, all other modules keep their names and weights, and if anything is wrong nothing is changed.

    Args:
        model: the model; swap before an optimizer, DDP or torch.compile takes it over.
        blocks: from patterns of module names to factories, ``dim -> nn.Module`` over ``(B, H, W, C)``. In a pattern,
            ``*`` stands for one part of a name or a piece of it, and ``[0-2]`` for one of these characters.
        adapter: what goes around the blocks in networks that foveal does not know, such as ChannelsFirst or
            ``partial(Tokens, grid=14)``.

    Returns:
        What was replaced, in the order of the modules.

    Raises:
        ValueError, TypeError: naming the pattern or the module, and the reason: nothing matches, patterns overlap, the
            network is not served (Hiera, NaFlex, patch dropout, an unknown grid), a block does not fit.

    Example:
        >>> model = timm.create_model("vit_small_patch16_224", pretrained=True)
        >>> print(foveal.swap(model, {"blocks.*.mlp": ConvGLU}))
    """
    matched = _match(model, blocks)
    grids: dict[int, Any] = {}
    fitting: set[tuple] = set()
    planned = []
    for name, factory in matched.items():
        with located(name):
            site = Site(model, name, grids)
            check_no_hooks(site.module)
            place = find_place(site) if adapter is None else Place(adapter)
            planned.append((site, place, _build(site, place, factory, fitting)))
    done = []
    for site, place, new in planned:
        place.prepare()
        setattr(site.owner, site.attribute, new)
        done.append(_describe(site, new))
    return Replacements(done)


def _match(model: nn.Module, blocks: Mapping[str, Factory]) -> dict[str, Factory]:
    """The factory of every module that a pattern names, in the order of the modules."""
    if not isinstance(blocks, Mapping) or not blocks:
        raise TypeError(f"blocks must be a non-empty mapping from patterns of module names to blocks, got {blocks!r}")
    modules = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    chosen: dict[str, str] = {}
    for pattern in blocks:
        names = [name for name in modules if _fits(name, pattern)]
        if not names:
            raise ValueError(f"{pattern!r} matches no module of {type(model).__name__}{_suggestions(pattern, modules)}")
        for name in names:
            if name in chosen:
                raise ValueError(f"{chosen[name]!r} and {pattern!r} both match {name}")
            chosen[name] = pattern
    for name in chosen:
        outer = next((other for other in chosen if name.startswith(f"{other}.")), None)
        if outer is not None:
            raise ValueError(f"{chosen[outer]!r} and {chosen[name]!r} overlap: {name} lies in {outer}")
        shared = next((other for other in modules if other != name and modules[other] is modules[name]), None)
        if shared is not None:
            raise ValueError(f"{name} is shared: {shared} is the same module")
    return {name: blocks[chosen[name]] for name in modules if name in chosen}


def _fits(name: str, pattern: str) -> bool:
    parts, patterns = name.split("."), pattern.split(".")
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))


def _suggestions(pattern: str, names: Iterable[str]) -> str:
    general = {".".join("*" if part.isdigit() else part for part in name.split(".")) for name in names}
    close = get_close_matches(pattern, sorted(general), n=3)
    return f"; close to it: {', '.join(map(repr, close))}" if close else ""


def _build(site: Site, place: Place, factory: Factory, fitting: set[tuple]) -> nn.Module:
    """The block for a site, in its adapter, after a look at the shape that it returns."""
    dim, out_dim = widths_of(site.module) if place.width is None else (place.width, place.width)
    arguments = arguments_of(site.module, site.owner, dim, out_dim)
    block = call(factory, dim, offered=arguments, where="block")
    if (id(factory), dim, out_dim) not in fitting:
        _check_shape(block, dim, out_dim, arguments["device"], arguments["dtype"])
        fitting.add((id(factory), dim, out_dim))
    return place.adapter(block).train(site.module.training)


def _check_shape(block: nn.Module, dim: int, out_dim: int, device: Any, dtype: Any) -> None:
    shape = 1, *_PROBE, dim
    try:
        out = output_shape(block, shape, device, dtype)
    except ValueError:  # it may be made for the grids of the host alone, whose forward will tell
        return
    if out != (1, *_PROBE, out_dim):
        raise ValueError(f"the block must return (B, H, W, {out_dim}), but turned {shape} into {out}")


def _describe(site: Site, new: nn.Module) -> Replacement:
    name = f"{type(new.block).__name__} in {type(new).__name__}" if isinstance(new, Adapter) else type(new).__name__
    before, after = (sum(p.numel() for p in module.parameters()) for module in (site.module, new))
    exempt = frozenset(
        f"{prefix}.{parameter}"
        for prefix, module in new.named_modules(prefix=site.name)
        for parameter in getattr(module, "no_weight_decay", set)()
    )
    return Replacement(site.name, type(site.module).__name__, name, before, after, exempt)
