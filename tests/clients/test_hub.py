"""Weights on their way: safetensors, the hub's files, and back through `local-dir:`."""

import json
import shutil
from types import SimpleNamespace

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.models import _hub, push_to_hf_hub, save_for_hf

import foveal  # noqa: F401  registers the variants

SHALLOW = {"depths": (1, 1, 1, 1)}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return timm.create_model("transnext_micro", num_classes=7, **SHALLOW).eval()


def assert_same_numbers(loaded, model):
    x = torch.randn(2, 3, 64, 48)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(x), model(x))


def test_saved_for_the_hub_and_loaded_from_the_folder(model, tmp_path):
    save_for_hf(model, tmp_path, model_args=SHALLOW, safe_serialization=True)
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()
    assert json.loads((tmp_path / "config.json").read_text())["architecture"] == "transnext_micro"
    assert_same_numbers(timm.create_model(f"local-dir:{tmp_path}", pretrained=True), model)


def test_features_from_the_folder(model, tmp_path):
    save_for_hf(model, tmp_path, model_args=SHALLOW, safe_serialization=True)
    features = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, features_only=True).eval()
    x = torch.randn(1, 3, 64, 48)
    with torch.no_grad():
        for actual, expected in zip(features(x), model.forward_intermediates(x)[1], strict=True):
            assert torch.equal(actual, expected)


def test_pushed_to_the_hub(model, tmp_path, monkeypatch):
    """timm's `push_to_hf_hub`, with the hub itself replaced by a folder."""

    class Folder:
        def __init__(self, **kwargs):
            pass

        def create_repo(self, repo_id, **kwargs):
            return SimpleNamespace(repo_id=repo_id)

        def file_exists(self, **kwargs):
            return False

        def upload_folder(self, folder_path, **kwargs):
            shutil.copytree(folder_path, tmp_path / "hub")

    monkeypatch.setattr(_hub, "HfApi", Folder)
    push_to_hf_hub(model, "someone/transnext", model_args=SHALLOW)
    assert (tmp_path / "hub" / "README.md").exists()
    assert_same_numbers(timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True), model)
