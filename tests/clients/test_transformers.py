"""transformers takes the variants as its timm backbone."""

import pytest
import timm
import torch

import foveal  # noqa: F401  registers the variants

transformers = pytest.importorskip("transformers")

SHALLOW = {"depths": (1, 1, 1, 1)}


def backbone_config(**kwargs):
    return transformers.TimmBackboneConfig(backbone="transnext_micro", out_indices=[0, 1, 2, 3], **kwargs)


def test_backbone_gives_the_models_maps():
    backbone = transformers.AutoBackbone.from_config(backbone_config()).eval()
    assert backbone.channels == [48, 96, 192, 384]
    features = timm.create_model("transnext_micro", features_only=True).eval()
    features.load_state_dict(backbone._backbone.state_dict())
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        for actual, expected in zip(backbone(x).feature_maps, features(x), strict=True):
            assert torch.equal(actual, expected)


def test_upernet_trains_and_is_saved(tmp_path):
    config = transformers.UperNetConfig(
        backbone_config=backbone_config(), hidden_size=32, num_labels=4, auxiliary_in_channels=192
    )
    net = transformers.UperNetForSemanticSegmentation(config)
    images, labels = torch.randn(2, 3, 64, 96), torch.randint(0, 4, (2, 64, 96))
    out = net(pixel_values=images, labels=labels)
    assert out.logits.shape == (2, 4, 64, 96)
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.backbone.parameters())

    net.save_pretrained(tmp_path)
    loaded = transformers.UperNetForSemanticSegmentation.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(images).logits, net.eval()(images).logits)
