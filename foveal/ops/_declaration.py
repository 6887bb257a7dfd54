"""How an op of foveal is declared to PyTorch: its schema, default implementation, fake kernel, gradient and FLOPs.

All of it is Python, so the ops exist without a compiler. A compiled library, once loaded, only adds kernels for its
device to the same schemas, and the default implementation gives way to them.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


def declare(name: str, schema: str, *, default: Callable, fake: Callable, flops: Callable | None = None) -> None:
    """Declare ``foveal::name``. ``flops`` takes the op's arguments with every tensor replaced by its shape."""
    qualified = f"foveal::{name}"
    torch.library.define(qualified, schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(qualified, "default", default)
    torch.library.register_fake(qualified, fake)
    register_flop_formula(getattr(torch.ops.foveal, name))(flops or (lambda *args, **kwargs: 0))


def declare_gradient(name: str, setup_context: Callable, backward: Callable) -> None:
    """Give ``foveal::name`` its derivatives: ``backward`` runs a backward op, or :func:`gradients_to_differentiate`."""
    torch.library.register_autograd(f"foveal::{name}", backward, setup_context=setup_context)


def wanted_mask(needs_input_grad: Sequence[bool]) -> int:
    """Bit i says that input i wants a gradient."""
    return sum(1 << i for i, needed in enumerate(needs_input_grad) if needed)


def gradients(function: Callable, inputs: Sequence[Tensor | None], wanted: int, grad: Tensor) -> tuple[Tensor, ...]:
    """The default backward of an op: differentiate its reference. Unwanted gradients are empty tensors.

    ``function`` takes ``inputs``; bit i of ``wanted`` asks for the gradient of input i.
    """
    chosen = [i for i, x in enumerate(inputs) if x is not None and wanted >> i & 1]
    result = [grad.new_empty(0) for _ in inputs]
    if chosen:
        # Autograd is switched off inside the kernel of an op; the reference needs it back.
        with (
            torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False),
            torch.enable_grad(),
        ):
            leaves = {i: x.detach().requires_grad_() for i, x in enumerate(inputs) if x is not None and i in chosen}
            out = function(*(leaves.get(i, x) for i, x in enumerate(inputs)))
            values = torch.autograd.grad(out, list(leaves.values()), grad, materialize_grads=True)
        for i, value in zip(chosen, values, strict=True):
            result[i] = value.contiguous()
    return tuple(result)


def gradients_to_differentiate(
    function: Callable, inputs: Sequence[Tensor | None], wanted: int, grad: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients of a definition, with a graph of their own. None where they are not wanted.

    Autograd's grad mode is on in a backward pass where its result is to be differentiated in turn (create_graph).
    """
    chosen = [i for i, x in enumerate(inputs) if x is not None and wanted >> i & 1]
    # Views, as one tensor may be two inputs.
    leaves = {i: x.view_as(x) for i, x in enumerate(inputs) if x is not None and i in chosen}
    out = function(*(leaves.get(i, x) for i, x in enumerate(inputs)))
    values = torch.autograd.grad(out, list(leaves.values()), grad, create_graph=True, materialize_grads=True)
    found = dict(zip(chosen, values, strict=True))
    return tuple(found.get(i) for i in range(len(inputs)))


def fake_gradients(inputs: Sequence[Tensor | None], wanted: int, grad: Tensor) -> tuple[Tensor, ...]:
    """What a backward op returns: a contiguous gradient for every wanted input, an empty tensor for the others."""
    return tuple(
        x.new_empty(x.shape) if x is not None and wanted >> i & 1 else grad.new_empty(0) for i, x in enumerate(inputs)
    )


def only_wanted(grads: Sequence[Tensor], wanted: int) -> tuple[Tensor | None, ...]:
    """Turn the empty placeholders of a backward op into None, as autograd wants them."""
    return tuple(g if wanted >> i & 1 else None for i, g in enumerate(grads))
