"""What the examples share: models of the user's own, and files that are missing or damaged."""

import json
import os
import subprocess
import sys

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_model

from tests.examples.running import ENVIRONMENT, EXAMPLES, load
from training.arguments import parse_args

MODULE = """
from functools import partial
import timm, foveal
from timm.models import register_model
from foveal.blocks import AggregatedAttention, ConvGLU
from foveal.models import Backbone, Stage, timm_model

mixer = partial(AggregatedAttention, num_heads=2, pool_ratio=2)

@register_model
def {name}_net(pretrained=False, **kwargs):
    stages = [Stage(dim=dim, depth=1, mixer=mixer, mlp=ConvGLU) for dim in (8, 16, 16, 16)]
    return timm_model(Backbone, "{name}_net", pretrained, stages=stages, **kwargs)

@register_model
def {name}_swapped(pretrained=False, **kwargs):
    model = timm.create_model("test_vit", pretrained=pretrained, **dict(img_size=16, patch_size=4, **kwargs))
    foveal.swap(model, {{"blocks.*.mlp": ConvGLU}})
    return model
"""
QUICK = ("--img-size", "16", "--epochs", "1", "--batch-size", "256", "--micro-batch", "128")


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The name of a module in the current folder that registers models."""
    monkeypatch.chdir(tmp_path)
    name = f"own_{os.getpid()}_{tmp_path.name}".replace("-", "_").lower()
    (tmp_path / f"{name}.py").write_text(MODULE.format(name=name))
    yield name
    sys.modules.pop(name, None)


@pytest.mark.filterwarnings("ignore:Overwriting")
@pytest.mark.parametrize("kind", ["net", "swapped"])
def test_trains_a_model_of_ones_own(kind, own, train, tmp_path):
    """And goes on with it, without being told of the module again."""
    model = f"{own}_{kind}"
    assert train.main([*QUICK, "--import", own, "--model", model, "--output", "run"]) == 0
    sys.modules.pop(own)
    args, _ = parse_args(["--resume", "run"])
    assert args.model == model
    assert own in sys.modules
    options = ["--img-size", "16", "--model", model, "--import", own, "--output", "other"]
    args, _ = parse_args([*options, "--weights", "run/model.safetensors"])
    loaded = load("train").build_model(args, 10, 1, weights=True)
    assert sum(p.numel() for p in loaded.parameters()) > 0


def test_other_examples_import_it_too(own, tmp_path):
    torch.manual_seed(0)
    load("common/models").import_modules(parse_args(["--import", own, "--output", "unused"])[0])
    save_model(timm.create_model(f"{own}_net"), "own.safetensors")
    options = ["--import", own, "--model", f"{own}_net"]
    load("export").main([*options, "--checkpoint", "own.safetensors", "--size", "32", "--rounds", "1"])
    assert (tmp_path / "exports" / f"{own}_net.pt2").exists()
    load("look").main([*options, "--random-weights", "--size", "32", "--pictures", "profile"])
    cost = ["--cost", "memory", "--sizes", "32", "--output", "costs", "--device", "cpu"]
    assert load("evaluate").main(["--import", own, "--models", f"{own}_net", *cost]) == 0
    assert json.loads((tmp_path / "costs" / "results.json").read_text())[0]["model"] == f"{own}_net"


def test_a_detector_over_it(own):
    pytest.importorskip("pycocotools")
    detect = load("detect")
    args = detect.parse_args(["--import", own, "--model", f"{own}_net", "--size", "64", "--output", "unused"])
    assert detect.build_detector(args, 4).backbone.body.feature_info.channels() == [8, 16, 16, 16]


def test_a_module_that_cannot_be_imported(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        parse_args(["--import", "no_such_module"])
    assert "argument --import: no_such_module cannot be imported (ModuleNotFoundError" in capsys.readouterr().err


MISSING = [
    ("classify.py", ["photo.jpg", "--checkpoint", "no.pth"], "--checkpoint"),
    ("evaluate.py", ["--cost", "--checkpoint", "resnet18=no.pth"], "--checkpoint"),
    ("export.py", ["--checkpoint=no.pth"], "--checkpoint"),
    ("look.py", ["--digits", "no.pth"], "--digits"),
    ("detect.py", ["--weights", "no.pth"], "--weights"),
    ("detect.py", ["--backbone-weights", "no.pth"], "--backbone-weights"),
    ("train.py", ["--model", "transnext_tiny", "--weights", "no.pth"], "--weights"),
]


@pytest.mark.parametrize(("example", "args", "argument"), MISSING)
def test_a_missing_file_is_refused_before_torch_is_imported(example, args, argument, tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('imported')")
    command = [sys.executable, str(EXAMPLES / example), *args]
    done = subprocess.run(command, env={**ENVIRONMENT, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, f"{example}: error: argument {argument}: there is no file no.pth\n")


@pytest.fixture(params=["empty.pth", "text.pth", "text.safetensors", "cut.pth"])
def damaged(request, tmp_path):
    path = tmp_path / request.param
    path.write_text("" if "empty" in path.name else "no weights")
    if "cut" in path.name:
        torch.save(timm.create_model("test_vit").state_dict(), path)
        path.write_bytes(path.read_bytes()[:1000])
    return path


@pytest.mark.parametrize(
    ("example", "args", "argument"),
    [
        ("classify", ["{image}", "--model", "test_vit", "--checkpoint", "{file}"], "--checkpoint"),
        ("export", ["--model", "test_vit", "--checkpoint", "{file}"], "--checkpoint"),
        ("look", ["--model", "test_vit", "--checkpoint", "{file}"], "--checkpoint"),
        ("look", ["--digits", "{file}"], "--digits"),
        ("train", ["--model", "test_vit", "--img-size", "160", "--weights", "{file}"], "--weights"),
        (
            "evaluate",
            ["--data", "folder={folder}", "--models", "test_vit", "--checkpoint", "test_vit={file}"],
            "--checkpoint",
        ),
    ],
)
def test_a_damaged_file_is_refused(example, args, argument, damaged, train, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images" / "cat").mkdir(parents=True)
    image = tmp_path / "images" / "cat" / "image.png"
    Image.new("RGB", (32, 32)).save(image)
    names = {"file": damaged, "image": image, "folder": tmp_path / "images"}
    with pytest.raises(SystemExit) as exit_info:
        load(example).main([arg.format(**names) for arg in args])
    assert exit_info.value.code == 2
    assert f"argument {argument}: {damaged} holds no weights of " in capsys.readouterr().err


def test_a_damaged_run_is_refused(damaged, tmp_path, capsys):
    damaged.rename(tmp_path / "checkpoint.pt")
    with pytest.raises(SystemExit) as exit_info:
        parse_args(["--resume", str(tmp_path)])
    assert exit_info.value.code == 2
    assert f"argument --resume: {tmp_path / 'checkpoint.pt'} is no checkpoint of a run" in capsys.readouterr().err


def test_damaged_results_are_refused(tmp_path, capsys):
    (tmp_path / "results.json").write_text("[{")
    with pytest.raises(SystemExit):
        load("evaluate").main(["--cost", "--output", str(tmp_path)])
    assert f"argument --output: {tmp_path / 'results.json'} holds no results" in capsys.readouterr().err
