"""The architectures of timm with foveal's blocks that are models of their own."""

import pytest
import timm
import torch

import foveal
from foveal.blocks import ConvGLU
from tests.helpers import assert_near

NAME = "vit_tiny_patch16_convglu_224"
SMALL = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_classes": 5}


@pytest.mark.parametrize(("name", "parameters"), [(NAME, 5_781_928), ("vit_small_patch16_convglu_224", 22_179_688)])
def test_sizes(name, parameters):
    assert sum(p.numel() for p in timm.create_model(name, device="meta").parameters()) == parameters


@torch.no_grad()
def test_is_a_swapped_vit():
    """Also with registers, at several sizes, and as feature maps."""
    arguments = {**SMALL, "reg_tokens": 2, "dynamic_img_size": True}
    vit = timm.create_model("vit_tiny_patch16_224", **arguments).eval()
    foveal.swap(vit, {"blocks.*.mlp": ConvGLU})
    model = timm.create_model(NAME, **arguments).eval()
    model.load_state_dict(vit.state_dict())
    for size in ((32, 32), (16, 64)):
        x = torch.randn(2, 3, *size)
        assert_near(model(x), vit(x))
    maps = timm.create_model(NAME, features_only=True, out_indices=(0, 1), **arguments)(x)
    assert [tuple(m.shape) for m in maps] == [(2, 24, 1, 4)] * 2


def test_follows_set_input_size():
    model = timm.create_model(NAME, **SMALL)
    model.set_input_size((64, 32))
    assert model(torch.randn(1, 3, 64, 32)).shape == (1, 5)


@pytest.mark.parametrize("argument", [{"mlp_layer": ConvGLU}, {"patch_drop_rate": 0.1}, {"no_such": 1}], ids=str)
def test_what_it_does_not_take_is_named(argument):
    with pytest.raises((TypeError, ValueError), match=next(iter(argument))):
        timm.create_model(NAME, **SMALL, **argument)
