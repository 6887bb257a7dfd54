"""Adapters of peft on every kind of layer, pruning, weight norm: they train, and they show in evaluation too."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from foveal.models import transnext
from foveal.models.checkpoints import checkpoint_filter_fn
from tests.helpers import randomised

LINEAR = ["qkv", "proj", "fc1", "fc2"]
CONVOLUTIONS = ["dwconv"]


def small():
    torch.manual_seed(0)
    return randomised(transnext((12, 24), (1, 1), (1, 2), (4, 4), (4, None), pretrain_size=32, num_classes=4), 0.2)


def step(net, x):
    """One step of training; the gradients by name."""
    net.train()
    net.zero_grad()
    net(x).square().sum().backward()
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.grad is not None:
                parameter.sub_(0.01 * parameter.grad / (parameter.grad.norm() + 1e-9))
    return {name: p.grad for name, p in net.named_parameters() if p.requires_grad}


def logits(net, x):
    with torch.no_grad():
        return net.eval()(x)


@pytest.mark.parametrize(
    ("kind", "targets"),
    [("LoraConfig", LINEAR), ("LoHaConfig", LINEAR + CONVOLUTIONS), ("IA3Config", LINEAR + CONVOLUTIONS)],
)
def test_peft(kind, targets):
    peft = pytest.importorskip("peft")
    x = torch.randn(2, 3, 64, 64)
    config = {"feedforward_modules": []} if kind == "IA3Config" else {"r": 2}
    net = peft.get_peft_model(small(), getattr(peft, kind)(target_modules=targets, **config))
    before = logits(net, x)
    gradients = {}
    for _ in range(3):
        gradients = step(net, x)
    assert gradients
    assert all(gradient is not None and gradient.any() for gradient in gradients.values())
    adapted = logits(net, x)
    assert (adapted - before).abs().max() > 1e-4
    with net.disable_adapter():
        torch.testing.assert_close(logits(net, x), logits(small(), x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(net, x), adapted, rtol=1e-5, atol=1e-5)
    merged = net.merge_and_unload()
    torch.testing.assert_close(logits(merged, x), adapted, rtol=1e-4, atol=1e-4)


def layers(net):
    return [m for m in net.modules() if isinstance(m, nn.Linear | nn.Conv2d)]


def test_pruning_every_layer():
    net, x = small(), torch.randn(2, 3, 64, 64)
    before = logits(net, x)
    for layer in layers(net):
        prune.l1_unstructured(layer, "weight", 0.5)
    for _ in range(3):
        gradients = step(net, x)
        assert all(g is not None for g in gradients.values())
    pruned = logits(net, x)
    assert (pruned - before).abs().max() > 1e-3
    state = copy.deepcopy(net.state_dict())
    step(net, x)
    net.load_state_dict(state)
    torch.testing.assert_close(logits(net, x), pruned, rtol=1e-5, atol=1e-5)
    for layer in layers(net):
        prune.remove(layer, "weight")
    torch.testing.assert_close(logits(net, x), pruned, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "normalise",
    [parametrizations.weight_norm, parametrizations.spectral_norm, nn.utils.weight_norm, nn.utils.spectral_norm],
    ids=["weight norm", "spectral norm", "older weight norm", "older spectral norm"],
)
def test_normalised_weights(normalise):
    net, x = small(), torch.randn(2, 3, 64, 64)
    for layer in layers(net):
        normalise(layer)
    for _ in range(2):
        gradients = step(net, x)
        assert all(g is not None and g.isfinite().all() for g in gradients.values())
    with torch.no_grad():
        plain = logits(net, x)
        net.stages[0].blocks[0].mlp.dwconv.register_forward_hook(lambda module, args, out: 2 * out)
        assert (logits(net, x) - plain).abs().max() > 1e-4


def test_a_hydra_config_of_a_backbone():
    """In Hydra's default mode, where lists arrive as its own containers."""
    instantiate = pytest.importorskip("hydra.utils").instantiate
    attention = {"_target_": "foveal.blocks.AggregatedAttention", "_partial_": True, "num_heads": 2}
    mlp = {"_target_": "foveal.blocks.ConvGLU", "_partial_": True}
    stage = {"_target_": "foveal.models.Stage", "dim": 16, "depth": 2, "mlp": mlp}
    stages = [{**stage, "mixer": attention, "drop_path": [0.1, 0.2]}, {**stage, "mixer": [attention, attention]}]
    net = instantiate({"_target_": "foveal.models.Backbone", "num_classes": 5, "stages": stages})
    assert net(torch.randn(1, 3, 32, 48)).shape == (1, 5)
    assert net.stages[0].blocks[1].drop_path.drop_prob == 0.2


@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "model.", "backbone.", "encoder.model.", "a.b.c."]
)
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "model_ema", "state_dict_ema"])
def test_weights_under_any_prefix(prefix, wrapper):
    net = small()
    weights = {f"{prefix}{name}": value for name, value in net.state_dict().items()}
    weights[f"{'neck.' if prefix else 'head.'}fc.bias"] = net.state_dict()["head.fc.bias"]
    checkpoint = weights if wrapper is None else {wrapper: weights, "epoch": 3, "optimizer": {"state": {}}}
    if wrapper and wrapper.endswith("_ema"):
        checkpoint[wrapper.removesuffix("_ema")] = {name: value + 1 for name, value in weights.items()}
    found = checkpoint_filter_fn(checkpoint, net)
    assert found.keys() == net.state_dict().keys()
    assert all(found[name].equal(value) for name, value in net.state_dict().items())
