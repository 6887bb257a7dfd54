"""FLOPs of whole models, as torch counts them and as the paper does."""

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from foveal.analysis._evaluating import evaluating
from foveal.ops import backend

_Formula = Callable[..., int]


def count_flops(model: nn.Module, images: Any) -> int:
    """FLOPs of a forward pass, a multiply-add being two, by torch's FlopCounterMode.

    The count is the same on every device and every backend of foveal's ops, but for a pooled map of a single cell,
    whose values the definitions in plain PyTorch multiply without a matrix product. The position bias of log-CPB, which
    eval mode keeps from one forward pass to the next, is counted as computed anew. On the meta device nothing is
    computed.

    Args:
        model: any module that takes images, or maps; it is run in eval mode and left as it was.
        images: ``(B, in_chans, H, W)``, on the model's device, or what else the model takes.
    """
    return _count(model, images, MISSING_IN_TORCH)


def count_multiply_adds(model: nn.Module, images: Tensor) -> int:
    """Multiply-adds of a forward pass by the paper's rule, the "FLOPs (G)" of its tables.

    To half of what :func:`count_flops` returns, the rule adds 5 for each element that leaves a LayerNorm, 1 for each
    that enters an adaptive pool, and the whole first layer of log-CPB's MLP, 2 hidden for each relative position
    (foveal splits that layer into rows and columns, and so need not compute it).

    Args:
        model: any module that takes images; it is run in eval mode and left as it was.
        images: ``(B, in_chans, H, W)``, on the model's device.
    """
    with backend("auto"):  # in which log-CPB's table is an op, with a formula, with or without kernels
        return _count(model, images, MISSING_IN_TORCH | _PAPERS_RULE) // 2


def _count(model: nn.Module, images: Any, formulas: Mapping[Any, _Formula]) -> int:
    counter = flop_counter(formulas)
    with evaluating(model), counter, torch.no_grad():
        model(images)
    return counter.get_total_flops()


class _Running:
    """In the place of FlopCounterMode's own tracker, whose hooks on all modules would have every child called."""

    def __init__(self, names: Sequence[str]):
        self._names = names

    @property
    def parents(self) -> set[str]:
        return {"Global", *self._names[-1:]}

    def __enter__(self) -> None: ...

    def __exit__(self, *exception: Any) -> None: ...


def flop_counter(formulas: Mapping[Any, _Formula], running: Sequence[str] = ()) -> FlopCounterMode:
    """A counter of what runs without it too, in all ("Global") and for the last name of ``running`` at that time."""
    counter = FlopCounterMode(display=False, custom_mapping=dict(formulas))
    counter.mod_tracker = cast(Any, _Running(running))
    return counter


def _attention(query, key, value, *args, out_shape=None, **kwargs) -> int:
    return sdpa_flop_count(query, key, value)


def _ten_an_element(x, *args, out_shape=None, **kwargs) -> int:
    return 10 * prod(x)


def _two_an_element(x, *args, out_shape=None, **kwargs) -> int:
    return 2 * prod(x)


def _both_layers(rows, columns, weight1, bias1, weight2, bias2, out_shape=None) -> int:
    heads, hidden = weight2
    return 2 * rows[0] * columns[0] * hidden * (2 + heads)


MISSING_IN_TORCH: dict[Any, _Formula] = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}
_PAPERS_RULE: dict[Any, _Formula] = {
    torch.ops.aten.native_layer_norm: _ten_an_element,
    torch.ops.foveal.add_layer_norm: _ten_an_element,
    torch.ops.foveal.add_layer_norm_: _ten_an_element,
    torch.ops.aten._adaptive_avg_pool2d: _two_an_element,
    torch.ops.foveal.activate_and_pool: _two_an_element,
    torch.ops.foveal.activate_and_pool_with_input_bias: _two_an_element,
    torch.ops.foveal.log_cpb_table: _both_layers,
}
