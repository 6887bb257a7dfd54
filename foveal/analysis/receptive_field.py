"""The effective receptive field: which pixels the centre of a feature map really depends on."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from foveal.analysis._evaluating import evaluating


def effective_receptive_field(
    model: nn.Module, images: Tensor | Iterable[Tensor], *, stage: int = -1, seed: int = 0
) -> Tensor:
    """How strongly the feature at the centre of a stage's map depends on each pixel (Luo et al. 2016; figures 2, 8, 9).

    With J the Jacobian of the C features of the cell at row H' // 2, column W' // 2, the value of a pixel is the root
    of the sum of J squared over features and colours, averaged over the images. One backward pass a batch estimates it
    without bias in the square: the features are summed with random signs, ``E[(signs . J) ** 2] = sum(J ** 2)``. (A
    plain sum would not do: features that leave a LayerNorm sum to a constant, whose gradient is zero.) The more
    images, the smoother; 50 or more make a good picture.

    The model is run in eval mode. Its training flags, its parameters and their gradients stay as they are.

    Args:
        model: any model with timm's ``forward_intermediates``, a ``features_only`` extractor of timm's, or a module
            from images to one map or a list of maps ``(B, C, H', W')``.
        images: images ``(B, in_chans, H, W)`` on the model's device, or an iterable of such batches of one size.
        stage: index into the model's feature maps, from the end where negative.
        seed: of the random signs.

    Returns:
        ``(H, W)``, on the images' device.

    Raises:
        ValueError: where there is no such stage, no image, or no map ``(B, C, H', W')``.
    """
    total, count = torch.zeros(()), 0
    signs = torch.Generator().manual_seed(seed)
    with evaluating(model), torch.inference_mode(False), torch.enable_grad():
        for batch in (images,) if isinstance(images, Tensor) else images:
            pixels = batch.detach().clone().requires_grad_()
            features = _stage_map(model, pixels, stage)
            centre = features[:, :, features.shape[2] // 2, features.shape[3] // 2]
            sign = torch.randint(2, centre.shape, generator=signs).to(centre) * 2 - 1
            (gradient,) = torch.autograd.grad(centre, pixels, sign)
            squares = gradient.square().sum(dim=(0, 1))
            total = total.to(squares) + squares
            count += len(batch)
    if not count:
        raise ValueError("images must hold at least one image, got none")
    return (total / count).sqrt()


def draw_receptive_fields(fields: Mapping[str, Tensor | Mapping[str, Tensor]], path: str | Path) -> None:
    """Write a PNG with one panel for each receptive field, every one relative to its own largest value.

    All panels have one colour scale, logarithmic over three decades, as most of a field is faint; what is fainter, or
    zero, is drawn in the colour of the lower end. Needs matplotlib.

    Args:
        fields: fields ``(H, W)`` by the title of their panel, side by side; or such mappings by the name of a model,
            one below the other.
        path: the file to write.

    Example:
        >>> fields = {
        ...     name: {f"stage {s}": effective_receptive_field(net, images, stage=s) for s in range(4)}
        ...     for name, net in nets.items()
        ... }
        >>> draw_receptive_fields(fields, "receptive_fields.png")
    """
    one_row = any(isinstance(field, Tensor) for field in fields.values())
    rows = cast(Mapping[str, Mapping[str, Tensor]], {"": fields} if one_row else fields)
    if not fields or not all(rows.values()):
        raise ValueError("fields must hold at least one receptive field, for every model, got none")
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    norm = LogNorm(1e-3, 1, clip=True)
    width = max(map(len, rows.values()))
    figure = Figure(figsize=(3.1 * width + 1, 2.9 * len(rows) + 0.6), layout="constrained")
    grid = figure.subplots(len(rows), width, squeeze=False)
    for (name, row), panels in zip(rows.items(), grid, strict=True):
        for panel, (title, field) in zip(panels, row.items(), strict=False):
            relative = field.detach().float().cpu() / max(field.max().item(), torch.finfo(torch.float32).tiny)
            shown = panel.imshow(relative.clamp(min=norm.vmin).numpy(), norm=norm, cmap="magma")
            panel.set(title=title, xlabel="column (pixels)")
        panels[0].set_ylabel(f"{name}\nrow (pixels)".lstrip())
        for panel in panels[len(row) :]:
            panel.set_axis_off()
    figure.suptitle("Effective receptive field of the centre feature")
    figure.colorbar(shown, ax=grid, label="root mean square gradient,\nrelative to the largest", extend="min")
    figure.savefig(path, dpi=120)


def _stage_map(model: Any, images: Tensor, stage: int) -> Tensor:
    """The map ``(B, C, H', W')`` of a stage."""
    if hasattr(model, "forward_intermediates"):
        count = len(model.feature_info)
        _check_stage(stage, count)
        (features,) = model.forward_intermediates(
            images, indices=[stage % count], output_fmt="NCHW", stop_early=True, intermediates_only=True
        )
    else:
        maps = model(images)
        maps = [maps] if isinstance(maps, Tensor) else list(maps)
        _check_stage(stage, len(maps))
        features = maps[stage]
        if features.dim() == 4 and getattr(model, "output_fmt", "NCHW") == "NHWC":
            features = features.permute(0, 3, 1, 2)
    if features.dim() != 4:
        raise ValueError(f"model must give maps of shape (B, C, H, W), got {tuple(features.shape)}")
    return features


def _check_stage(stage: int, count: int) -> None:
    if not -count <= stage < count:
        raise ValueError(f"stage must be an index into the model's {count} feature maps, got {stage}")
