"""The example that looks into models: which pictures it writes for what, and what it refuses."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_model

from tests.examples.running import colourful, load, run

ATTENTION = [f"attention_stages.{stage}.blocks.{block}.png" for stage, block in enumerate((1, 1, 5, 1))]
SMALL = ("--model", "transnext_pico", "--size", "64")


@pytest.fixture
def look():
    return load("look")


def written(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_all_pictures_of_an_untrained_model(tmp_path):
    options = (
        "--random-weights",
        "--query",
        "0",
        "0.5",
        "--crops",
        "2",
        "--beside",
        "test_convnext",
        "--output",
        tmp_path,
    )
    out, err = run("look.py", *SMALL, *options)
    assert out.split() == [str(tmp_path / name) for name in (*ATTENTION, "receptive_fields.png", "profile.png")]
    assert written(tmp_path) == sorted([*ATTENTION, "receptive_fields.png", "profile.png"])
    assert all(0.05 < colourful(path) < 0.95 for path in tmp_path.iterdir())
    assert "8/8" in err
    width, height = Image.open(tmp_path / "receptive_fields.png").size
    assert width > 1.5 * height  # four stages of two models


def test_without_weights_the_profile_alone(look, tmp_path, capsys, monkeypatch):
    create = timm.create_model

    def offline(name, pretrained=False, **kwargs):
        if pretrained:
            raise OSError("no way to the hub")
        return create(name, **kwargs)

    monkeypatch.setattr(look.timm, "create_model", offline)
    look.main([*SMALL, "--output", str(tmp_path)])
    assert written(tmp_path) == ["profile.png"]
    error = capsys.readouterr().err
    assert "No weights of transnext_pico from the hub (OSError: no way to the hub)" in error
    assert "pass --checkpoint or --random-weights" in error


def test_an_image_of_the_users_and_a_checkpoint(look, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "photo.png")
    save_model(timm.create_model("transnext_pico"), str(tmp_path / "weights.safetensors"))
    options = ["--checkpoint", str(tmp_path / "weights.safetensors"), "--pictures", "attention"]
    chosen = ["--block", "stages.2.blocks.3", "--query", "0.5", "0.5", "--heads", "0", "3"]
    look.main([str(tmp_path / "photo.png"), *SMALL, *options, *chosen, "--output", str(tmp_path / "out")])
    assert written(tmp_path / "out") == ["attention_stages.2.blocks.3.png"]


def test_the_image_is_the_centre_of_the_first(look):
    picture = Image.new("RGB", (90, 60), "blue")
    picture.paste("red", (15, 0, 75, 60))
    centre, crops = look.prepare({"a": picture, "b": Image.new("RGB", (50, 50))}, 30, 5)
    assert crops.shape == (5, 3, 30, 30)
    torch.testing.assert_close(centre[:, 2:-2, 2:-2], torch.tensor([1.0, 0, 0])[:, None, None].expand(3, 26, 26))


@pytest.mark.slow
def test_digits_that_the_training_example_trained(tmp_path):
    run("train.py", "--img-size", "8", "--epochs", "1", "--batch-size", "256", "--output", tmp_path / "run")
    options = (
        "--digits",
        tmp_path / "run" / "model.safetensors",
        "--query",
        "0",
        "0",
        "--crops",
        "4",
        "--output",
        tmp_path / "look",
    )
    run("look.py", *options)
    names = [f"attention_stages.{stage}.blocks.1.png" for stage in range(3)]
    assert written(tmp_path / "look") == sorted([*names, "receptive_fields.png", "profile.png"])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nowhere.jpg"], "argument images: no file or folder nowhere.jpg"),
        (["{}"], "argument images: no image in the folder {}"),
        (["{}/text"], "argument images: cannot read"),
        (["--model", "transnext_huge"], "argument --model: timm knows no model 'transnext_huge'"),
        (["--checkpoint", "nowhere"], "argument --checkpoint: there is no file nowhere"),
        (["--digits", "nowhere"], "argument --digits: there is no file nowhere"),
        (["--digits", "x", "--beside", "resnet18"], "argument --digits: looks at digits, and takes neither"),
        (["photo.jpg", "--digits", "x"], "argument --digits: looks at digits, and takes neither"),
        (["--query", "1", "0"], "argument --query: must be at least 0 and less than 1"),
        (["--crops", "0"], "argument --crops: must be at least 1"),
        (["--device", "abacus"], "argument --device: "),
        ([*SMALL, "--random-weights", "--block", "stages.9"], "argument --block: block must name one attention"),
        ([*SMALL, "--random-weights", "--heads", "2"], "argument --heads: of stages.0.blocks.1: heads must be some of"),
    ],
)
def test_errors_name_the_argument(args, message, look, tmp_path, capsys):
    (tmp_path / "text").write_text("no image")
    with pytest.raises(SystemExit) as exit_info:
        look.main([*(arg.format(tmp_path) for arg in args), "--output", str(tmp_path / "out")])
    assert exit_info.value.code == 2
    assert message.format(tmp_path) in capsys.readouterr().err
