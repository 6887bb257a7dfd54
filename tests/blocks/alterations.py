"""What people do to layers of a network: each a function of the module that holds the layer, and its name there."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from foveal.ops import PositionBias


def scaled(out, factor=1.5):
    return out._replace(table=factor * out.table) if isinstance(out, PositionBias) else factor * out


class WithBranch(nn.Module):
    """A layer and something learned that is added to it, as adapters are."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer
        self.strength = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def forward(self, *args, **kwargs):
        return scaled(self.layer(*args, **kwargs), 1 + self.strength)


def replaced_by_a_sequence(parent, name):
    setattr(parent, name, nn.Sequential(getattr(parent, name)))


def wrapped(parent, name):
    setattr(parent, name, WithBranch(getattr(parent, name)))


def subclassed(parent, name):
    kind = type(getattr(parent, name))
    forward = kind.forward
    getattr(parent, name).__class__ = type(
        f"Scaled{kind.__name__}", (kind,), {"forward": lambda self, *args, **kw: scaled(forward(self, *args, **kw))}
    )


def given_a_forward(parent, name):
    layer = getattr(parent, name)
    original = layer.forward
    layer.forward = lambda *args, **kwargs: scaled(original(*args, **kwargs))


def hooked_after(parent, name):
    getattr(parent, name).register_forward_hook(lambda module, args, out: scaled(out))


def hooked_before(parent, name):
    getattr(parent, name).register_forward_pre_hook(
        lambda module, args: tuple(arg * 1.5 if isinstance(arg, torch.Tensor) else arg for arg in args)
    )


def hooked_backwards(parent, name):
    getattr(parent, name).register_full_backward_hook(
        lambda module, grad_in, grad_out: tuple(None if g is None else 3 * g for g in grad_in)
    )


def compiled(parent, name):
    getattr(parent, name).compile(backend=lambda graph, inputs: lambda *args: [scaled(x) for x in graph(*args)])


def weight_norm(parent, name):
    parametrizations.weight_norm(getattr(parent, name))
    with torch.no_grad():
        getattr(parent, name).parametrizations.weight.original0.mul_(1.5)


def older_weight_norm(parent, name):
    nn.utils.weight_norm(getattr(parent, name))
    with torch.no_grad():
        getattr(parent, name).weight_g.mul_(1.5)


def spectral_norm(parent, name):
    parametrizations.spectral_norm(getattr(parent, name))


def older_spectral_norm(parent, name):
    nn.utils.spectral_norm(getattr(parent, name))


def pruned(parent, name):
    prune.l1_unstructured(getattr(parent, name), "weight", 0.5)


def pruned_then_loaded(parent, name):
    """The mask hides in a hook; the attribute ``weight`` is of the last call, and stale."""
    prune.l1_unstructured(getattr(parent, name), "weight", 0.5)
    state = {key: 1.5 * value for key, value in getattr(parent, name).state_dict().items()}
    getattr(parent, name).load_state_dict(state)


def without_parameters(parent, name):
    """As the replicas of DataParallel are: weights are plain attributes."""
    layer = getattr(parent, name)
    for key, value in list(layer._parameters.items()):
        del layer._parameters[key]
        layer.__dict__[key] = None if value is None else 1.5 * value.detach()


def taken_away_between_calls(parent, name):
    """Offloading: the weights are there while the layer is called, and nowhere else."""
    layer = getattr(parent, name)
    original, weights = layer.forward, {key: p for key, p in layer._parameters.items() if p is not None}

    def leave():
        for key, weight in weights.items():
            layer._parameters[key] = nn.Parameter(weight.detach().to("meta"), requires_grad=False)

    def forward(*args, **kwargs):
        for key, weight in weights.items():
            layer._parameters[key] = weight
        try:
            return scaled(original(*args, **kwargs))
        finally:
            leave()

    layer.forward = forward
    leave()


def only_its_weights_taken_away(parent, name):
    """The same by hooks, with nothing else to be seen."""
    layer = getattr(parent, name)
    weights = {key: p for key, p in layer._parameters.items() if p is not None}

    def come(module, args):
        module._parameters.update(weights)

    def leave(module, args, out):
        for key, weight in weights.items():
            module._parameters[key] = nn.Parameter(weight.detach().to("meta"), requires_grad=False)

    layer.register_forward_pre_hook(come)
    layer.register_forward_hook(leave)
    leave(layer, None, None)


CALLS: dict[str, Callable] = {
    f.__name__: f
    for f in (
        *(replaced_by_a_sequence, wrapped, subclassed, given_a_forward, hooked_after, hooked_before),
        *(hooked_backwards, compiled),
    )
}
"""Of any layer: what its call does."""

WEIGHTS: dict[str, Callable] = {
    f.__name__: f
    for f in (
        *(weight_norm, older_weight_norm, spectral_norm, older_spectral_norm, pruned, pruned_then_loaded),
        *(without_parameters, taken_away_between_calls, only_its_weights_taken_away),
    )
}
"""Of a layer with a weight: where it comes from."""
