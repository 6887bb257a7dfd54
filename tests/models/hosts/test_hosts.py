"""Blocks in every architecture that swap knows: what they see, and that nothing else changes."""

import copy
import pickle

import pytest
import torch
from torch import nn

from foveal import swap
from foveal.blocks import AggregatedAttention, ConvGLU
from foveal.blocks.layouts.adapter import Adapter
from foveal.models.hosts.whole_maps import see_whole_maps
from tests.helpers import assert_near, randomised
from tests.models.hosts.tiny import HOSTS, MIXED

PARTS = [*((name, "mlp") for name in HOSTS), *((name, "mixer") for name in MIXED)]


def attention(dim):
    return AggregatedAttention(dim, 2, pool_ratio=2)


def built(host):
    return randomised(host.build(), std=0.2).eval()


def images(host):
    return torch.randn(2, 3, *host.size)


def site(model, name):
    return model.get_submodule(name.rpartition(".")[0]), model.get_submodule(name)


class Spy(nn.Module):
    """A block that keeps the shape and remembers it; prefix tokens are welcome."""

    def __init__(self, dim, seen):
        super().__init__()
        self.dim, self.seen = dim, seen

    def forward(self, x):
        assert x.shape[3] == self.dim
        self.seen.append(tuple(x.shape[1:3]))
        return x

    def pointwise(self, x):
        return x


@pytest.mark.parametrize(("name", "part"), PARTS)
def test_blocks_see_the_grid(name, part):
    """Channels last, and rows before columns, which a picture that is no square tells apart."""
    host = HOSTS[name]
    model, seen = built(host), []
    swap(model, {getattr(host, part): lambda dim: Spy(dim, seen)})
    model(images(host))
    assert seen == host.grids


class AsBefore(nn.Module):
    """The module that was replaced, as a block: what an adapter does, undone."""

    def __init__(self, old: nn.Module, adapter: str, owner: nn.Module):
        super().__init__()
        self.old, self.adapter, self.owner = old, adapter, [owner]

    def forward(self, x):
        grid, owner = x.shape[1:3], self.owner[0]
        if self.adapter in ("Tokens", "TokenMixer"):
            return self.old(x.flatten(1, 2)).unflatten(1, grid)
        if self.adapter == "SizedTokens":
            return self.old(x.flatten(1, 2), grid).unflatten(1, grid)
        windowed = getattr(owner, "_attn", getattr(owner, "_partition_attn", None))
        old = windowed if windowed is not None and self.old is owner.attn else self.old
        if self.adapter == "ChannelsFirst":
            return old(x.permute(0, 3, 1, 2).contiguous()).permute(0, 2, 3, 1)
        return old(x)

    def pointwise(self, x):
        return self.old(x)


@pytest.mark.parametrize(("name", "part"), PARTS)
@torch.no_grad()
def test_the_replaced_modules_as_blocks_change_nothing(name, part):
    host = HOSTS[name]
    pattern = getattr(host, part)
    model, x = built(host), images(host)
    expected = model(x)
    original = copy.deepcopy(model)
    other = copy.deepcopy(model)
    replaced = swap(other, {pattern: lambda dim: Spy(dim, [])})
    before = iter([(site(original, r.name), r.new.rpartition(" in ")[2]) for r in replaced])

    def factory(dim):
        (owner, old), adapter = next(before)
        return AsBefore(old, adapter, owner)

    swap(model, {pattern: factory})
    assert_near(model(x), expected, tol=1e-6)
    assert (other(x) - expected).abs().max() > 1e-3 * expected.abs().max(), "the modules make no difference"


def opened(block: ConvGLU, mlp: nn.Module) -> None:
    """Make a ConvGLU of an MLP: its gate the MLP's hidden layer, its value one, a convolution that looks nowhere."""
    width = block.hidden_dim
    layers = [layer for layer in mlp.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    first, *middle, last = layers
    nn.init.zeros_(block.fc1.weight)
    nn.init.ones_(block.fc1.bias)
    nn.init.zeros_(block.fc2.bias)
    gate, *value = (*first.weight.flatten(1).chunk(first.weight.shape[0] // width),)
    block.fc1.weight[:width] = gate
    block.fc1.bias[:width] = 0 if first.bias is None else first.bias[:width]
    if value:  # gated before
        block.fc1.weight[width:], block.fc1.bias[width:] = value[0], first.bias[width:]
    nn.init.zeros_(block.dwconv.weight)[:, :, 1, 1] = 1
    nn.init.zeros_(block.dwconv.bias)
    if middle:  # a depthwise convolution
        block.dwconv.weight[:], block.dwconv.bias[:] = middle[0].weight, middle[0].bias
    block.fc2.weight[:] = last.weight.flatten(1)
    if last.bias is not None:
        block.fc2.bias[:] = last.bias


@pytest.mark.parametrize("name", HOSTS)
@torch.no_grad()
def test_an_open_gate_is_the_mlp(name):
    host = HOSTS[name]
    model, x = built(host), images(host)
    expected = model(x)
    mlps = [site(model, r.name)[1] for r in swap(copy.deepcopy(model), {host.mlp: ConvGLU})]
    after = iter(mlps)

    def factory(dim, device, dtype):
        mlp = next(after)
        activation = next(part for kind, part in mlp.named_children() if kind.startswith("act"))
        *_, last = (layer for layer in mlp.modules() if isinstance(layer, nn.Linear | nn.Conv2d))
        width = last.weight.shape[1]
        block = ConvGLU(dim, width, act_layer=lambda: activation, device=device, dtype=dtype)
        opened(block, mlp)
        return block

    swap(model, {host.mlp: factory})
    assert_near(model(x), expected, tol=1e-5)


@pytest.mark.parametrize("name", HOSTS)
def test_convglu(name):
    """Trains, keeps the size, copies, and loads the weights that were not touched."""
    host = HOSTS[name]
    check(host, {host.mlp: ConvGLU})
    mlps = swap(host.build(), {host.mlp: ConvGLU})
    before, after = (sum(getattr(r, f"parameters_{when}") for r in mlps) for when in ("before", "after"))
    assert abs(after / before - 1) < 0.25  # the convolution weighs at a width of 16; at 384 it is 1%


@pytest.mark.parametrize("name", MIXED)
def test_aggregated_attention(name):
    check(HOSTS[name], {HOSTS[name].mixer: attention})


def check(host, blocks):
    original = built(host)
    model = copy.deepcopy(original)
    replaced = swap(model, blocks)
    randomised(model, std=0.1)
    x = images(host)
    y = model(x)
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert_near(twin(x), y, tol=1e-6)
            twin.load_state_dict(model.state_dict())
    untouched = {
        key: value
        for key, value in original.state_dict().items()
        if not any(key.startswith(f"{r.name}.") for r in replaced)
    }
    missing, unexpected = model.load_state_dict(untouched, strict=False)
    assert not unexpected
    assert {key.partition(".block.")[0] for key in missing} <= {
        key for r in replaced for key in (r.name, *model.get_submodule(r.name).state_dict(prefix=f"{r.name}."))
    }
    assert all(torch.equal(model.state_dict()[key], value) for key, value in untouched.items())


@torch.no_grad()
def test_compiles_at_two_sizes():
    """With a grid that a block carries; the adapters' own tests do so with that of a ViT."""
    host = HOSTS["Swin"]
    model = built(host)
    swap(model, {host.mlp: ConvGLU})
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="eager")
    for size in (host.size, (96, 64)):
        x = torch.randn(2, 3, *size)
        assert_near(compiled(x), model(x))


@pytest.mark.parametrize(("name", "part", "block"), [("Swin", "mixer", attention), ("CAFormer", "mlp", ConvGLU)])
@torch.no_grad()
def test_exports(name, part, block):
    host = HOSTS[name]
    model, x = built(host), images(host)
    swap(model, {getattr(host, part): block})
    assert_near(torch.export.export(model, (x,)).module()(x), model(x))


@pytest.mark.parametrize("name", ["ViT, registers, any size", "Swin", "PVTv2", "CAFormer"])
def test_gradient_checkpointing_changes_nothing(name):
    host = HOSTS[name]
    model, x = built(host), images(host)
    swap(model, {host.mlp: ConvGLU})
    gradients = []
    for enable in (False, True):
        model.train().set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert_near(gradients[1], gradients[0])


@pytest.mark.parametrize("name", ["Swin", "SwinV2"])
@torch.no_grad()
def test_swin_without_windows_takes_another_size(name):
    host = HOSTS[name]
    model = built(host)
    swap(model, {host.mixer: attention})
    x = torch.randn(1, 3, 64, 96)
    expected = model(x)
    model.set_input_size((64, 96))
    assert model.layers[0].blocks[1].input_resolution == (16, 24)
    assert_near(model(x), expected)


@torch.no_grad()
def test_maxvit_without_windows_takes_another_size():
    host = HOSTS["MaxViT"]
    model = built(host)
    x = torch.randn(1, 3, 80, 48)
    with pytest.raises((AssertionError, RuntimeError)):
        model(x)
    swap(model, {host.mixer: attention})
    assert model(x).isfinite().all()


def test_blocks_without_windows_stay_as_they_are():
    block = nn.Linear(2, 2)
    see_whole_maps(block)
    assert type(block) is nn.Linear


def test_adapters_are_where_they_belong():
    expected = {
        "ViT, class token": "Tokens",
        "PVTv2": "SizedTokens",
        "ConvNeXt": None,
        "CoAtNet": "ChannelsFirst",
    }
    for name, adapter in expected.items():
        model = HOSTS[name].build()
        first = model.get_submodule(swap(model, {HOSTS[name].mlp: ConvGLU})[0].name)
        assert (type(first).__name__ if isinstance(first, Adapter) else None) == adapter
