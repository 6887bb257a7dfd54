"""Whole models against the golden numbers: logits and every stage's map, in each mode."""

import pytest
import torch

from foveal.models import Backbone, transnext
from foveal.models.checkpoints import from_official
from tests.golden_files import Golden, assert_close


def small_transnext(meta: dict, **kwargs) -> Backbone:
    arch = meta["arch"]
    pool_ratios = [None if ratio == 1 else ratio for ratio in arch["sr_ratios"]]
    return transnext(
        arch["embed_dims"],
        arch["depths"],
        arch["num_heads"],
        (8, 8, 4, 4),
        pool_ratios,
        img_size=meta["img_size"],
        pretrain_size=meta["pretrain_size"],
        **kwargs,
    ).eval()


@pytest.mark.parametrize(
    "name",
    ["classifier_AAAA_64", "classifier_AAAM_64", "classifier_AAAM_96_pretrain64", "classifier_AAAM_128_linear_pool2"],
)
def test_classifier(name):
    golden = Golden(name)
    meta = golden.meta
    model = small_transnext(meta, pool_grid=meta["fixed_pool_size"])
    model.load_state_dict(from_official(golden.weights()))
    images = golden.draw("input", meta["batch"], 3, meta["img_size"], meta["img_size"])
    with torch.no_grad():
        logits = model(images)
        _, maps = model.forward_intermediates(images, output_fmt="NHWC")
    assert_close(logits, golden["logits"], "logits")
    for stage, x in enumerate(maps, start=1):
        assert_close(x.flatten(1, 2), golden[f"stage{stage}"], f"stage {stage}")


@pytest.mark.parametrize("mode", ["extrapolate", "interpolate"])
def test_dense_features(mode):
    golden = Golden(f"dense_{mode}_96x160")
    meta = golden.meta
    model = small_transnext(meta, bias_resampling=meta["bias"], num_classes=0)
    model.load_state_dict(from_official(golden.weights()))
    images = golden.draw("input", meta["batch"], 3, meta["height"], meta["width"])
    with torch.no_grad():
        maps = model.forward_intermediates(images, intermediates_only=True)
    for stage, x in enumerate(maps, start=1):
        assert_close(x, golden[f"stage{stage}"], f"stage {stage}")
