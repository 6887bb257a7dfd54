"""What blocks cost: against costs counted by hand, and against what autograd really holds."""

import pytest
import timm
import torch
from torch import nn

from foveal.analysis import count_flops, draw_profile, profile_blocks
from tests.analysis.test_receptive_field import foveal_backbone
from tests.examples.running import colourful


def test_costs_counted_by_hand():
    """Two Linears and a GELU: the second Linear's input is the GELU's result, the GELU's input the first's."""
    net = nn.Sequential(nn.Linear(3, 8), nn.Sequential(nn.GELU(), nn.Linear(8, 5)))
    first, gelu, last = profile_blocks(net, torch.randn(7, 3))
    assert first == ("0", 32, 2 * 7 * 3 * 8, 0)  # of images and weights nothing is kept
    assert gelu == ("1.0", 0, 0, 4 * 7 * 8)
    assert last == ("1.1", 45, 2 * 7 * 8 * 5, 4 * 7 * 8)


def test_a_model_without_containers_is_one_block():
    (cost,) = profile_blocks(nn.Linear(3, 8), torch.randn(7, 3))
    assert cost == ("", 32, 2 * 7 * 3 * 8, 0)


def test_a_storage_counts_once_and_where_it_is_saved_first():
    class Twice(nn.Module):
        def forward(self, x):
            return x.square() + x.sin()

    net = nn.Sequential(nn.Linear(3, 8), Twice(), nn.Flatten(), nn.Identity())
    assert [cost.saved_bytes for cost in profile_blocks(net, torch.randn(7, 3))] == [0, 4 * 7 * 8, 0, 0]


def test_what_is_between_the_blocks_counts():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.Sequential(nn.Linear(3, 8))
            self.weight = nn.Parameter(torch.randn(8, 2))

        def forward(self, x):
            return self.blocks(x) @ self.weight

    costs = profile_blocks(Net(), torch.randn(7, 3))
    assert [cost.name for cost in costs] == ["blocks.0", "(between blocks)"]
    assert costs[1][1:] == (16, 2 * 7 * 8 * 2, 4 * 7 * 8)


@pytest.mark.parametrize("name", ["foveal", "convnext_atto", "resnet18", "test_vit"])
def test_sums_to_the_model(name):
    net = foveal_backbone() if name == "foveal" else timm.create_model(name, img_size=64 if "vit" in name else None)
    net.train()
    images = torch.randn(1, 3, 64, 64)
    costs = profile_blocks(net, images)
    assert net.training
    assert sum(cost.flops for cost in costs) == count_flops(net, images)
    assert sum(cost.parameters for cost in costs) == sum(p.numel() for p in net.parameters())
    names = [cost.name for cost in costs]
    assert len(names) == len(set(names))
    if name == "foveal":
        stage = [f"stages.{i}.{part}" for i in (0, 1) for part in ("downsample", "blocks.0", "norm")]
        assert names == [*stage, "head"]
        assert all(cost.saved_bytes > 0 for cost in costs)


def test_saved_memory_is_what_the_graph_holds():
    """Walked from the result to the images, with what is there without a forward pass set aside."""
    net, images = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 5)), torch.randn(2, 3, 4, 4)
    nodes, storages = [net(images).grad_fn], {}
    while nodes:
        node = nodes.pop()
        nodes += [following for following, _ in node.next_functions if following is not None]
        for name in dir(node):
            if name.startswith("_saved_") and isinstance(value := getattr(node, name), torch.Tensor):
                storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    for tensor in (images, *net.parameters()):
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    assert sum(cost.saved_bytes for cost in profile_blocks(net, images)) == sum(storages.values()) > 0


def test_blocks_by_name():
    net = foveal_backbone()
    costs = profile_blocks(net, torch.randn(1, 3, 32, 32), ["stages.1", "stages.0.blocks.0.mixer"])
    assert [cost.name for cost in costs] == ["stages.1", "stages.0.blocks.0.mixer", "(between blocks)"]
    whole = profile_blocks(net, torch.randn(1, 3, 32, 32), ["stages"])
    assert sum(cost.flops for cost in costs) == sum(cost.flops for cost in whole)
    with pytest.raises(ValueError, match=r"blocks must name modules of the model, got 'stages.7'"):
        profile_blocks(net, torch.randn(1, 3, 32, 32), ["stages.7"])
    with pytest.raises(ValueError, match=r"'stages.0.norm' is inside 'stages.0'"):
        profile_blocks(net, torch.randn(1, 3, 32, 32), ["stages.0", "stages.0.norm"])


def test_leaves_the_model_alone():
    net, images = foveal_backbone(), torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        profile_blocks(net, images)
    assert all(parameter.grad is None for parameter in net.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_drawing(tmp_path):
    costs = profile_blocks(foveal_backbone(), torch.randn(1, 3, 32, 32))
    draw_profile(costs, tmp_path / "profile.png", title="small")
    assert colourful(tmp_path / "profile.png") > 0.05
    with pytest.raises(ValueError, match="costs must hold at least one block"):
        draw_profile([], tmp_path / "profile.png")
