"""Where the grid behind tokens comes from, in timm's ViT."""

import copy
import pickle

import pytest
import timm
import torch
from torch import nn
from torch.export import Dim

from foveal.blocks import ConvGLU
from foveal.blocks.layouts import CarriedGrid, PatchGrid, Tokens, grid_of
from tests.helpers import assert_near

TINY = {"embed_dim": 24, "depth": 2, "num_heads": 2, "img_size": 64, "reg_tokens": 2, "num_classes": 3}
SIZES = [(64, 64), (96, 32), (32, 96), (48, 80)]  # pixels; the patch is 16


def with_convglu(**kwargs):
    """A ViT of three prefix tokens whose MLPs are ConvGLUs that share a grid."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **TINY, **kwargs)
    grid = grid_of(model.patch_embed)
    for block in model.blocks:
        block.mlp = Tokens(ConvGLU(24), grid, model.num_prefix_tokens)
    return model.eval()


@pytest.fixture
def dynamic():
    return with_convglu(dynamic_img_size=True)


def images(size, batch=2):
    return torch.randn(batch, 3, *size)


def fixed_at(model, size):
    """The same model with the grid of an image size declared."""
    model = copy.deepcopy(model)
    for block in model.blocks:
        block.mlp.grid = (size[0] // 16, size[1] // 16)
    return model


@torch.no_grad()
def test_grid_follows_the_images(dynamic):
    for size in SIZES:
        x = images(size)
        assert torch.equal(dynamic(x), fixed_at(dynamic, size)(x))
        assert torch.equal(dynamic.forward_intermediates(x)[0], fixed_at(dynamic, size).forward_features(x))
    x = images((96, 32))
    assert not torch.equal(dynamic(x), fixed_at(dynamic, (32, 96))(x)), "the grid makes no difference"


@torch.no_grad()
def test_padded_images():
    model = with_convglu(dynamic_img_size=True, dynamic_img_pad=True)
    x = images((50, 70))
    assert torch.equal(model(x), fixed_at(model, (64, 80))(x))


@pytest.mark.parametrize("kwargs", [{"dynamic_img_size": True}, {}], ids=["carried", "of the embedding"])
@torch.no_grad()
def test_copies_have_a_grid_of_their_own(kwargs):
    model = with_convglu(**kwargs)
    x = images((64, 64))
    expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        grid = twin.blocks[0].mlp.grid
        assert grid is twin.blocks[1].mlp.grid
        assert grid is not model.blocks[0].mlp.grid
        assert torch.equal(twin(x), expected)
        if kwargs:
            twin(images((96, 32)))
            assert model.blocks[0].mlp.grid_size == (4, 4)
        else:
            twin.set_input_size((96, 32))
            twin(images((96, 32)))
            assert twin.blocks[0].mlp.grid_size == (6, 2)
            assert model.blocks[0].mlp.grid_size == (4, 4)


@torch.no_grad()
def test_compiles_at_several_sizes(dynamic):
    torch._dynamo.reset()
    expected = [dynamic(images(size).fill_(0.5)) for size in SIZES]
    compiled = torch.compile(copy.deepcopy(dynamic), fullgraph=True, backend="eager")
    for size, result in zip(SIZES, expected, strict=True):
        assert_near(compiled(images(size).fill_(0.5)), result)


@torch.no_grad()
def test_exports_with_static_and_dynamic_sizes(dynamic):
    x = images((64, 96))
    static = torch.export.export(with_convglu(), (images((64, 64)),)).module()
    assert_near(static(images((64, 64)).fill_(0.5)), with_convglu()(images((64, 64)).fill_(0.5)))
    shapes = ({0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},)
    program = torch.export.export(dynamic, (x,), dynamic_shapes=shapes).module()
    for size in SIZES:
        x = images(size, batch=3)
        assert_near(program(x), dynamic(x))


def test_gradient_checkpointing_changes_nothing(dynamic):
    x = images((96, 32))
    gradients = []
    for enable in (False, True):
        dynamic.train().set_grad_checkpointing(enable)
        dynamic.zero_grad()
        dynamic(x).square().sum().backward()
        gradients.append(dynamic.blocks[0].mlp.block.dwconv.weight.grad.clone())
    assert gradients[0].any()
    assert_near(gradients[1], gradients[0])


def test_recomputing_after_another_size_raises(dynamic):
    dynamic.train().set_grad_checkpointing(True)
    loss = dynamic(images((64, 64))).sum()
    dynamic(images((96, 32)))
    with pytest.raises(ValueError, match="6 x 2 cells"):
        loss.backward()


def test_no_map_has_passed_yet(dynamic):
    with pytest.raises(RuntimeError, match="no map has passed"):
        dynamic.blocks(torch.randn(1, 18, 24))


def test_channels_first_maps():
    grid = CarriedGrid()
    convolution = nn.Conv2d(3, 4, 1)
    grid.follow(convolution, "NCHW")
    convolution(torch.randn(1, 3, 5, 6))
    assert grid.grid_size == (5, 6)
    with pytest.raises(ValueError, match="output_fmt"):
        grid.follow(convolution, "NLC")


def test_kinds_of_grid():
    assert isinstance(grid_of(with_convglu().patch_embed), PatchGrid)
    assert isinstance(grid_of(with_convglu(dynamic_img_size=True).patch_embed), CarriedGrid)


@pytest.mark.parametrize(
    "embed",
    [
        nn.Conv2d(3, 8, 16),
        timm.layers.PatchEmbed(None, 16, embed_dim=8),
        timm.layers.PatchEmbed(64, 16, embed_dim=8, strict_img_size=False),
    ],
    ids=["no embedding", "no size", "any size"],
)
def test_unknown_grid_is_refused(embed):
    with pytest.raises(ValueError, match="is unknown"):
        grid_of(embed)
