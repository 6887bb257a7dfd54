"""A backbone as a model of timm's: made by name, with published or local weights, or as feature maps alone."""

from collections.abc import Callable, Sequence
from typing import Any

import timm
from timm.models import build_model_with_cfg

from foveal.models.backbone import Backbone
from foveal.models.checkpoints import checkpoint_filter_fn

LAYOUT = {"first_conv": "stages.0.downsample.proj", "classifier": "head.fc"}  # of a Backbone, for a pretrained_cfg


def timm_model(
    build: Callable[..., Backbone],
    name: str,
    pretrained: bool = False,
    *,
    out_indices: int | Sequence[int] | None = None,
    **kwargs: Any,
) -> Backbone:
    """What a function that ``timm.models.register_model`` registers returns.

    Then ``timm.create_model(name, ...)`` takes the arguments of ``build``, ``features_only`` with ``out_indices``,
    ``checkpoint_path`` and ``pretrained_cfg_overlay``; and so do the tools that make their models by it. For published
    weights, ``default_cfgs`` stands before the function, as in timm's files.

    Args:
        build: :class:`Backbone`, or a function that returns one.
        name: of the registered function.
        pretrained: load the weights that ``default_cfgs`` names.
        out_indices: stages whose maps ``features_only`` gives; None means all. timm's extractors by hooks and graphs
            (``feature_cls="hook"``, ``"fx"``) need them named.
        kwargs: arguments of ``build``, and what timm passes on.

    Example:
        >>> @timm.models.register_model
        ... def my_net(pretrained=False, **kwargs):
        ...     return timm_model(Backbone, "my_net", pretrained, stages=stages, **kwargs)
        >>> maps = timm.create_model("my_net", features_only=True)
    """
    if not kwargs.get("pretrained_cfg") and timm.get_pretrained_cfg(name) is None:
        kwargs["pretrained_cfg"] = LAYOUT
    feature_cfg: dict[str, Any] = {"out_indices": out_indices, "feature_cls": "getter"}
    if kwargs.get("feature_cls", "getter") != "getter":
        feature_cfg["output_fmt"] = "NHWC"  # as maps leave a stage's module, where hooks and graphs take them
    return build_model_with_cfg(
        build,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=feature_cfg,
        **kwargs,
    )
