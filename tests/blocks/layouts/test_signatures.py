"""timm's constructors with foveal's blocks as their parts."""

import copy
import pickle
from functools import partial

import pytest
import timm
import torch
from timm.models.inception_next import MetaNeXt
from timm.models.metaformer import MetaFormer, SepConv
from torch import nn

from foveal.blocks import GLU, AggregatedAttention, ConvGLU
from foveal.blocks.layouts import ChannelsFirst, TokenMixer, Tokens, attn_layer, mlp_layer, token_mixer
from tests.helpers import assert_near

VIT = {"embed_dim": 24, "depth": 2, "num_heads": 2, "img_size": 32, "patch_size": 8, "num_classes": 3}
POOLED = partial(AggregatedAttention, pool_ratio=2)


def vit(**kwargs):
    return timm.create_model("vit_tiny_patch16_224", **VIT, **kwargs).eval()


def count(module):
    return sum(p.numel() for p in module.parameters())


def survives(model, x):
    with torch.no_grad():
        expected = model(x)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(x), expected)
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(("arguments", "prefix"), [({}, 1), ({"reg_tokens": 4}, 5), ({"class_token": False}, 0)])
def test_mlp_of_a_vit(arguments, prefix):
    if not prefix:
        arguments |= {"global_pool": "avg"}
    model = vit(mlp_layer=mlp_layer(grid=4, num_prefix_tokens=prefix), proj_drop_rate=0.1, **arguments)
    mlp = model.blocks[0].mlp
    assert isinstance(mlp, Tokens)
    assert isinstance(mlp.block, ConvGLU)
    assert mlp.block.drop.p == 0.1
    assert mlp.block.hidden_dim == int(24 * 4 * 2 / 3)
    x = torch.randn(2, prefix + 16, 24)
    assert torch.equal(mlp(x), Tokens(mlp.block, 4, prefix)(x))
    survives(model, torch.randn(2, 3, 32, 32))


def test_mlp_keeps_the_parameters():
    before, after = (timm.create_model("vit_small_patch16_224", device="meta", **kwargs) for kwargs in (
        {}, {"mlp_layer": mlp_layer(grid=14, num_prefix_tokens=1)}
    ))  # fmt: skip
    assert count(before) == 22_050_664
    assert count(after) == 22_179_688  # 0.6% more: the depthwise convolution


def test_scaled_initialisation_of_a_vit():
    """fix_init divides the weights of proj and fc2 by the root of twice the depth."""
    arguments = {"class_token": False, "global_pool": "avg", "mlp_layer": mlp_layer(grid=4)}
    arguments["attn_layer"] = attn_layer(POOLED, grid=4)
    stds = []
    for fix_init in (False, True):
        torch.manual_seed(0)
        model = vit(fix_init=fix_init, **arguments)
        stds.append([[m.weight.detach().std() for m in (block.attn.proj, block.mlp.fc2)] for block in model.blocks])
    assert_near(torch.tensor(stds[1]) * torch.tensor([[2.0], [4.0]]).sqrt(), torch.tensor(stds[0]))


def test_arguments_of_a_partial_stand():
    model = vit(mlp_layer=mlp_layer(partial(ConvGLU, hidden_dim=10, act_layer=nn.SiLU), grid=4, num_prefix_tokens=1))
    assert model.blocks[0].mlp.block.hidden_dim == 10
    assert isinstance(model.blocks[0].mlp.block.act, nn.SiLU)
    assert isinstance(vit(mlp_layer=mlp_layer(GLU, grid=4, num_prefix_tokens=1)).blocks[1].mlp.block, GLU)


def test_attention_of_a_vit():
    layer = attn_layer(POOLED, grid=4)
    model = vit(attn_layer=layer, class_token=False, global_pool="avg", attn_drop_rate=0.2)
    mixer = model.blocks[0].attn
    assert isinstance(mixer, TokenMixer)
    assert (mixer.block.num_heads, mixer.block.attn_drop, mixer.block.pool_ratio) == (2, 0.2, 2)
    x = torch.randn(2, 16, 24)
    assert torch.equal(mixer(x), mixer.block(x.unflatten(1, (4, 4))).flatten(1, 2))
    survives(model, torch.randn(2, 3, 32, 32))


def test_prefix_tokens_do_not_fit_attention():
    with pytest.raises(ValueError, match="4 x 4 cells"):
        vit(attn_layer=attn_layer(POOLED, grid=4))(torch.randn(1, 3, 32, 32))


def metaformer(mixers, **kwargs):
    return MetaFormer(token_mixers=mixers, depths=(1, 1), dims=(16, 32), num_classes=3, **kwargs).eval()


def test_mixer_of_a_metaformer():
    model = metaformer(token_mixer(POOLED, head_dim=8), proj_drop_rate=0.1)
    blocks = [stage.blocks[0].token_mixer for stage in model.stages]
    assert all(isinstance(b, ChannelsFirst) and b.block.proj_drop.p == 0.1 for b in blocks)
    assert [b.block.num_heads for b in blocks] == [2, 4]
    x = torch.randn(1, 16, 5, 6)
    assert torch.equal(blocks[0](x), blocks[0].block(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
    survives(model, torch.randn(2, 3, 64, 96))


def test_mixer_of_one_stage_of_a_metaformer():
    model = metaformer([SepConv, token_mixer(partial(POOLED, num_heads=2))])
    assert isinstance(model.stages[1].blocks[0].token_mixer.block, AggregatedAttention)
    survives(model, torch.randn(2, 3, 64, 64))


def test_mixer_of_an_entry_point():
    model = timm.create_model("poolformerv2_s12", token_mixers=token_mixer(POOLED, head_dim=32), device="meta")
    assert [stage.blocks[0].token_mixer.block.num_heads for stage in model.stages] == [2, 4, 10, 16]


def test_mixer_of_an_inception_next():
    arguments = {"depths": (1, 1), "dims": (16, 32), "mlp_ratios": (4, 4), "num_classes": 3, "ls_init_value": 1.0}
    model = MetaNeXt(token_mixers=token_mixer(POOLED, head_dim=8), **arguments).eval()
    assert isinstance(model.stages[0].blocks[0].token_mixer.block, AggregatedAttention)
    survives(model, torch.randn(2, 3, 64, 96))
    with pytest.raises(ValueError, match="dilation must be 1"):
        MetaNeXt(token_mixers=token_mixer(POOLED, head_dim=8), output_stride=4, **arguments)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"mlp_layer": mlp_layer(grid=4, num_prefix_tokens=1), "scale_mlp_norm": True}, "norm_layer must be None"),
        ({"mlp_layer": mlp_layer(grid=4, num_prefix_tokens=1), "proj_bias": False}, "bias True"),
        ({"attn_layer": attn_layer(POOLED, grid=4), "qk_norm": True}, "qk_norm"),
        ({"attn_layer": attn_layer(POOLED, grid=4), "scale_attn_norm": True}, "scale_norm"),
        ({"attn_layer": attn_layer(POOLED, grid=4), "proj_bias": False}, "proj_bias"),
        ({"attn_layer": attn_layer(partial(POOLED, num_heads=5), grid=4)}, "attn_layer: num_heads"),
        ({"attn_layer": attn_layer(partial(POOLED, no_such=1), grid=4)}, "no_such"),
    ],
)
def test_what_blocks_do_not_serve_is_named(arguments, named):
    with pytest.raises((ValueError, TypeError), match=named):
        vit(**arguments)


def test_wrong_head_dim_is_named():
    with pytest.raises(ValueError, match="head_dim must divide the width 16, got 5"):
        metaformer(token_mixer(POOLED, head_dim=5))


def test_a_mixer_needs_heads():
    with pytest.raises(TypeError, match="num_heads"):
        metaformer(token_mixer(POOLED))
