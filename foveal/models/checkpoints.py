"""Weights in the layout of the official TransNeXt checkpoints, turned into foveal's."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

_ATTENTION = {
    "temperature": "temperature",
    "query_embedding": "query_embedding",
    "relative_pos_bias_local": "window_bias",
    "learnable_tokens": "positional_tokens",
    "learnable_bias": "positional_bias",
    "sr": "pool.proj",
    "norm": "pool.norm",
    "cpb_fc1": "log_cpb.fc1",
    "cpb_fc2": "log_cpb.fc2",
    "qkv": "qkv",
    "proj": "proj",
}
_MLP = {"fc1": "fc1", "dwconv.dwconv": "dwconv", "fc2": "fc2"}
_BUFFERS = ("relative_pos_index", "relative_coords_table", "seq_length_scale", "padding_mask")
_INSIDE = re.compile(r"(?:^|\.)(?:block|patch_embed)\d+\.")  # nothing official nests in these
_FOVEAL = re.compile(r"(?:^|\.)(?=stages\.\d+\.(?:downsample|blocks|norm)\.)")  # where the names of a backbone begin
_OFFICIAL = re.compile(r"(?:^|\.)(?=(?:patch_embed|block)\d+\.)")
_OWN = re.compile(  # in the keys of foveal's modules alone
    r"(?:^|\.)(?:mixer|log_cpb|pool\.(?:proj|norm)|window_bias|pool_bias|positional_(?:tokens|bias)|"
    r"dwconv\.(?:weight|bias)|stages\.\d+\.(?:downsample|blocks|norm))(?:\.|$)"
)
_LOCAL = re.compile(r"(?<=\.)(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")  # of wrappers inside
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")  # as timm takes them, averaged weights first


def _one_of(names: Mapping[str, str]) -> str:
    return f"({'|'.join(re.escape(name) for name in sorted(names, key=len, reverse=True))})"


# What stands at the end of an official key, most specific first, and foveal's name for it.
_RULES: list[tuple[str, Callable[[re.Match], str]]] = [
    (r"patch_embed(\d+)\.(proj|norm)", lambda m: f"stages.{int(m[1]) - 1}.downsample.{m[2]}"),
    (r"block(\d+)\.(\d+)\.(norm1|norm2)", lambda m: f"stages.{int(m[1]) - 1}.blocks.{m[2]}.{m[3]}"),
    (
        rf"block(\d+)\.(\d+)\.attn\.{_one_of(_ATTENTION)}",
        lambda m: f"stages.{int(m[1]) - 1}.blocks.{m[2]}.mixer.{_ATTENTION[m[3]]}",
    ),
    (
        rf"block(\d+)\.(\d+)\.mlp\.{_one_of(_MLP)}",
        lambda m: f"stages.{int(m[1]) - 1}.blocks.{m[2]}.mlp.{_MLP[m[3]]}",
    ),
    (r"norm(\d+)", lambda m: f"stages.{int(m[1]) - 1}.norm"),
    (r"head", lambda m: "head.fc"),
    (_one_of(_ATTENTION), lambda m: _ATTENTION[m[1]]),
    (_one_of(_MLP), lambda m: _MLP[m[1]]),
]


def from_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turn a state dict in the official key layout into foveal's.

    Keys are recognised by their tails, so it serves a classifier, a detector's ``backbone.*`` (whatever stands before
    the official names is kept), one lone attention or MLP module, and a dict of gradients as well as of weights.
    The projections q and kv are joined into qkv; the published code's buffers are dropped. What is in foveal's layout
    already stays as it is.

    Args:
        state_dict: a flat dict of tensors, or one under a key as timm's ("state_dict_ema", "model_ema", "state_dict",
            "model", the first that there is).

    Returns:
        A flat dict for ``load_state_dict`` of the matching foveal module.

    Raises:
        ValueError: where a key is of neither layout, or a projection lacks its other half.
    """
    state_dict = _unwrapped(state_dict)
    if any(map(_is_own, state_dict)):
        return dict(state_dict)
    converted: dict[str, Tensor] = {}
    for key, value in _join_projections(state_dict).items():
        if key.rpartition(".")[2] in _BUFFERS:
            continue
        name = _foveal_name(key)
        if name is None:
            raise _foreign(key)
        converted[name] = value.reshape(_foveal_shape(key, value))
    return converted


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """timm's hook: official weights become foveal's, weights saved by foveal pass as they are.

    Whatever stands before the backbone's names is taken off (``module.``, ``_orig_mod.``, ``encoder.model.``), and of a
    larger network, as a detector, only the backbone's part is taken.

    Raises:
        ValueError: where a key is of neither layout, or several backbones fit the model alike.
    """
    state_dict = {_LOCAL.sub("", key): value for key, value in _unwrapped(state_dict).items()}
    starts = [_FOVEAL.search(key) or _OFFICIAL.search(key) for key in state_dict]
    prefixes = sorted({key[: match.end()] for key, match in zip(state_dict, starts, strict=True) if match})
    wanted, candidates, errors = model.state_dict().keys(), {}, []
    for prefix in prefixes:
        inner = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        try:
            candidates[prefix] = from_official(inner)
        except (ValueError, RuntimeError) as error:  # another network, whose names are alike
            errors.append(error)
    if not candidates:
        raise errors[0] if errors else _foreign(next(iter(state_dict), ""))
    fitting = {prefix: len(wanted & inner.keys()) for prefix, inner in candidates.items()}
    best = [prefix for prefix, count in fitting.items() if count == max(fitting.values())]
    if len(best) > 1:
        raise ValueError(
            f"state_dict holds several backbones, under {', '.join(map(repr, best))}: pass the keys of one"
        )
    return candidates[best[0]]


def _foreign(key: str) -> ValueError:
    return ValueError(
        f"state_dict holds the key {key!r}, which is neither of the official TransNeXt layout nor foveal's"
    )


def load_file(path: str | Path) -> dict[str, Tensor]:
    """Read a checkpoint's tensors, from safetensors or from a pickle of tensors alone (``weights_only=True``)."""
    if str(path).endswith(".safetensors"):
        from safetensors.torch import load_file as load_safetensors

        return load_safetensors(path)
    return dict(_unwrapped(torch.load(path, map_location="cpu", weights_only=True)))


def _unwrapped(state_dict: Mapping) -> Mapping[str, Tensor]:
    for key in _WRAPPERS:
        if isinstance(state_dict.get(key), Mapping):
            return state_dict[key]
    nested = [key for key, value in state_dict.items() if isinstance(value, Mapping)]
    if nested and not any(isinstance(value, Tensor) for value in state_dict.values()):
        raise ValueError(f"state_dict holds no tensors, but dicts under {nested}: pass the one with the weights")
    return state_dict


def _foveal_name(key: str) -> str | None:
    module, dot, last = key.rpartition(".")
    module, parameter = (module, dot + last) if last in ("weight", "bias") else (key, "")
    for tail, name in _RULES:
        if match := re.search(rf"(?:^|(?<=\.)){tail}$", module):
            prefix = module[: match.start()]
            return None if _INSIDE.search(prefix) else prefix + name(match) + parameter
    return None


def _is_own(key: str) -> bool:
    return _OWN.search(key) is not None and not key.endswith(("dwconv.dwconv.weight", "dwconv.dwconv.bias"))


def _foveal_shape(key: str, value: Tensor) -> tuple[int, ...]:
    """foveal drops the axes of length one that the official layout keeps for broadcasting."""
    if key.endswith("temperature"):
        return (value.shape[0],)
    if key.endswith(("query_embedding", "learnable_bias")):
        return value.shape[0], value.shape[-1]
    if key.endswith("sr.weight"):
        return value.shape[0], value.shape[1]
    return tuple(value.shape)


def _join_projections(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    joined = dict(state_dict)
    for key in state_dict:
        if match := re.fullmatch(r"((?:.*\.)?)(q|kv)\.(weight|bias)", key):
            prefix, _, parameter = match.groups()
            halves = [f"{prefix}{name}.{parameter}" for name in ("q", "kv")]
            missing = [name for name in halves if name not in state_dict]
            if missing:
                raise ValueError(f"state_dict holds {key!r} without {missing[0]!r}, the other half of the projection")
            joined.pop(key)
            if key == halves[0]:
                joined[f"{prefix}qkv.{parameter}"] = torch.cat([state_dict[name] for name in halves])
    return joined
