"""The export example: what it writes equals the model, and says so."""

import re

import pytest
import timm
import torch
from safetensors.torch import save_file

from tests.examples.running import load, run

SHALLOW = {"depths": (1, 1, 1, 1)}


@pytest.fixture
def example():
    return load("export")


@pytest.fixture
def shallow(monkeypatch):
    """A transnext_micro of one block a stage, under its own name."""
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **kwargs: create(name, **SHALLOW, **kwargs))


def test_a_program_of_a_checkpoint(example, shallow, tmp_path, capsys):
    model = timm.create_model("transnext_micro").eval()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    args = ["--model", "transnext_micro", "--checkpoint", str(tmp_path / "weights.safetensors"), "--size", "64"]
    example.main([*args, "--rounds", "1", "--output", str(tmp_path)])
    out, err = capsys.readouterr()
    assert "writing and checking pt2" in err  # the progress bar
    assert "for images of 64 x 64 pixels" in out
    differences = [float(value) for value in re.findall(r"differs by ([\d.e+-]+)", out)]
    assert len(differences) == 2  # at the batch it was exported with, and at another
    assert max(differences) < 1e-5
    assert re.search(r"pt2: [\d.]+ ms for \(2, 3, 64, 64\), [\d.]+ times the model's speed", out)
    program = torch.export.load(tmp_path / "transnext_micro.pt2").module()
    x = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(program(x)[0], model(x))


def test_maps_of_any_size(example, shallow, tmp_path, capsys):
    args = ["--model", "transnext_micro", "--random-weights", "--features", "--dynamic", "size", "--size", "64", "96"]
    example.main([*args, "--rounds", "1", "--output", str(tmp_path)])
    out = capsys.readouterr().out
    assert re.search(r"for images of \d+ or more x \d+ or more pixels", out)
    assert "transnext_micro_features.pt2" in out
    assert "(2, 3, 99, 106) differs by" in out
    assert max(float(value) for value in re.findall(r"differs by ([\d.e+-]+)", out)) < 1e-5


@pytest.mark.slow
def test_every_format_from_the_command_line(tmp_path):
    pytest.importorskip("onnxruntime")
    args = ["--model", "test_convnext", "--random-weights", "--formats", "pt2", "aoti", "onnx", "--size", "64"]
    out, _ = run("export.py", *args, "--output", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {f"test_convnext{x}" for x in (".pt2", ".aoti.pt2", ".onnx")}
    differences = [float(value) for value in re.findall(r"differs by ([\d.e+-]+)", out)]
    assert len(differences) == 6
    assert max(differences) < 1e-4


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "transnext_huge"], "argument --model: timm knows no model 'transnext_huge'"),
        (["--checkpoint", "nowhere.pth"], "argument --checkpoint: there is no file nowhere.pth"),
        (["--formats", "tflite"], "argument --formats: invalid choice: 'tflite'"),
        (["--size", "1", "2", "3"], "argument --size: expected one or two numbers, got 3"),
        (["--size", "0"], "argument --size: must be at least 1, got 0"),
        (["--batch-size", "1"], "argument --batch-size: must be at least 2 where the batch is left open"),
        (["--device", "abacus"], "argument --device: "),
        (["--checkpoint", "a", "--random-weights"], "not allowed with argument --checkpoint"),
    ],
    ids=str,
)
def test_errors_name_the_argument(args, message, example, shallow, capsys):
    with pytest.raises(SystemExit) as exit_info:
        example.main(["--model", "transnext_micro", *args])
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err
