"""Evaluation over image sizes: hits against predictions made another way, data sets, options, costs, interruption."""

import json
import re
import signal

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torchvision.transforms import v2

from tests.examples.running import colourful, load, start
from tests.helpers import randomised

example = load("evaluate")
imagenet, models = (__import__(f"evaluation.{name}", fromlist=["x"]) for name in ("imagenet", "models"))
SYNSETS = list(imagenet.SYNSETS)
MODEL, SIZE = "test_efficientnet", 64
RANDOM = ["--random-weights", "--workers", "0", "--device", "cpu"]


def draw_image(seed: int, shape=(60, 80)) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(shape[::-1], Image.Resampling.BICUBIC)


def prepared(image: Image.Image, size: int) -> torch.Tensor:
    """The paper's preparation, written down once more."""
    bicubic = {"interpolation": v2.InterpolationMode.BICUBIC}
    cut = [v2.Resize(int(size / 0.875), **bicubic), v2.CenterCrop(size)]
    squash = [v2.Resize((size, size), **bicubic)]
    tail = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
    colours = v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    return v2.Compose([*(cut if size < 384 else squash), *tail, colours])(image)[None]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return timm.create_model(MODEL).eval()


def save(image: Image.Image, folder, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    image.save(folder / f"{name}.png")


@torch.no_grad()
def ranked(model, image: Image.Image, size: int, classes: list[int]) -> list[int]:
    """The classes in question from the likeliest to the least likely."""
    logits = model(prepared(image, size))[0, classes]
    return [classes[i] for i in logits.argsort(descending=True).tolist()]


def draw_data(model, root, size: int, classes: list[int], name_of) -> None:
    """Six images: two in the folder of their best class, three in one of the next four, one in another."""
    for seed, place in enumerate((0, 0, 1, 3, 4, 7)):
        image = draw_image(seed)
        save(image, root / name_of(ranked(model, image, size, classes)[place]), str(seed))


def evaluated(tmp_path, *args) -> list[dict]:
    assert example.main([*map(str, args), *RANDOM, "--output", str(tmp_path / "out")]) == 0
    return json.loads((tmp_path / "out" / "results.json").read_text())


@pytest.mark.parametrize("data", ["imagenet", "imagenet-a", "imagenet-r", "imagenet-sketch", "imagenet-v2"])
def test_hits_of_a_data_set(data, model, tmp_path, capsys):
    subset = imagenet.classes_of(data, tmp_path)
    assert len(subset) == (200 if data in ("imagenet-a", "imagenet-r") else 1000)
    name_of = str if data == "imagenet-v2" else SYNSETS.__getitem__
    draw_data(model, tmp_path / "data", SIZE, sorted(subset.values()), name_of)
    (row,) = evaluated(tmp_path, "--models", MODEL, "--data", f"{data}={tmp_path}/data", "--sizes", SIZE)
    assert (row["images"], row["of"], row["top-1_hits"], row["top-5_hits"]) == (6, 6, 2, 5)
    out = capsys.readouterr().out
    assert f"{data}, top-1 (%)" in out
    assert "33.33" in out
    assert "83.33" in out
    assert "accuracies mean nothing" in out


def test_a_large_size_squashes_the_whole_image(model, tmp_path):
    draw_data(model, tmp_path / "data", 384, list(range(1000)), SYNSETS.__getitem__)
    (row,) = evaluated(tmp_path, "--models", MODEL, "--data", f"imagenet={tmp_path}/data", "--sizes", 384)
    assert (row["top-1_hits"], row["top-5_hits"]) == (2, 5)


def test_several_models_and_sizes_in_one_picture(model, tmp_path, capsys):
    draw_data(model, tmp_path / "data", SIZE, list(range(1000)), SYNSETS.__getitem__)
    names = ["transnext_pico", "transnext_pico:linear,interpolate", "test_vit"]
    rows = evaluated(tmp_path, "--models", *names, "--data", f"imagenet={tmp_path}/data", "--sizes", 48, 32)
    assert [(row["model"], row["size"]) for row in rows] == [(name, size) for name in names for size in (32, 48)]
    assert all(row["images"] == 6 for row in rows)
    assert colourful(tmp_path / "out" / "results.png") > 0.003


def test_a_folder_with_classes_of_ones_own(tmp_path):
    torch.manual_seed(0)
    net = timm.create_model(MODEL, num_classes=3).eval()
    torch.save(net.state_dict(), tmp_path / "own.pth")
    names = ["apple", "pear", "plum"]
    for seed in range(4):
        image = draw_image(seed)
        save(image, tmp_path / "data" / names[ranked(net, image, SIZE, [0, 1, 2])[0]], str(seed))
    for name in names:  # one more in each, so that no folder is empty
        save(draw_image(9), tmp_path / "data" / name, "9")
    checkpoint = f"{MODEL}={tmp_path}/own.pth"
    data = f"folder={tmp_path}/data"
    (row,) = evaluated(tmp_path, "--models", MODEL, "--data", data, "--sizes", SIZE, "--checkpoint", checkpoint)
    assert (row["of"], row["top-1_hits"], row["top-5_hits"]) == (7, 5, 7)


# ImageNet-C.


@pytest.fixture
def corrupted(tmp_path):
    """An image for every corruption and severity, some in the archives' folders of kinds."""
    for index, name in enumerate(imagenet.ALEXNET):
        home = tmp_path / "c" / ("noise" if "noise" in name else "") / name
        for severity in range(1, 6):
            save(draw_image(index, (64, 64)), home / str(severity) / SYNSETS[7 * index], "0")
    return tmp_path / "c"


def test_corrupted_images(corrupted, tmp_path, capsys):
    rows = evaluated(tmp_path, "--models", MODEL, "--data", f"imagenet-c={corrupted}", "--sizes", SIZE)
    assert len({row["data"] for row in rows}) == 75
    top1 = sum(row["top-1_hits"] for row in rows)
    expected = 100 * sum(1 / value for value in imagenet.ALEXNET.values()) / 15
    assert top1 == 0
    assert f"imagenet-c, mCE (%)\n{'':<{len(MODEL)}}{SIZE:>9}\n{MODEL}{expected:>9.2f}" in capsys.readouterr().out


def test_mean_corruption_error():
    errors = {f"imagenet-c/{name}/{s}": value for name, value in imagenet.ALEXNET.items() for s in range(1, 6)}
    assert imagenet.mean_corruption_error(errors) == pytest.approx(1)
    errors |= {f"imagenet-c/fog/{s}": 0.1 * s for s in range(1, 6)}
    assert imagenet.mean_corruption_error(errors) == pytest.approx((14 + 0.3 / 0.819324) / 15)


def test_a_missing_corruption_is_named(corrupted, tmp_path, capsys):
    (corrupted / "fog" / "3").rename(corrupted / "elsewhere")
    with pytest.raises(SystemExit):
        evaluated(tmp_path, "--models", MODEL, "--data", f"imagenet-c={corrupted}", "--sizes", SIZE)
    assert f"argument --data: no folder {corrupted}/fog/3" in capsys.readouterr().err


# Options.


def mixers(options: str) -> list[torch.nn.Module]:
    """The first mixer of each stage of transnext_pico in float64, with and without options."""
    nets = [models.build(f"transnext_pico{end}", 224, 10, "random", "float64", "cpu") for end in ("", f":{options}")]
    return list(zip(*([stage.blocks[0].mixer for stage in net.stages] for net in nets), strict=True))


@pytest.mark.parametrize(("option", "stage"), [("linear", 0), ("interpolate", 0), ("interpolate", 3)])
@torch.no_grad()
def test_an_option_changes_larger_images_alone(option, stage):
    plain, changed = mixers(option)[stage]
    for mixer in (plain, changed):
        torch.manual_seed(0)
        randomised(mixer)
    side, channels = plain.pretrain_grid[0], plain.dim
    x = torch.randn(1, side, side, channels, dtype=torch.float64)
    torch.testing.assert_close(changed(x), plain(x))
    x = torch.randn(1, side + 9, side + 9, channels, dtype=torch.float64)
    assert (changed(x) - plain(x)).abs().max() > 1e-3 * plain(x).abs().max()


@torch.no_grad()
def test_fixed_length():
    """Global attention keeps log N of pre-training; aggregated attention that of a window inside the map."""
    first, *_, last = mixers("fixed-length")
    for mixer in (*first, *last):
        mixer.qkv.weight.mul_(20)  # far from uniform attention
    x = torch.randn(1, 7, 7, 192, dtype=torch.float64)
    torch.testing.assert_close(last[1](x), last[0](x))
    x = torch.randn(1, 14, 14, 192, dtype=torch.float64)
    assert (last[1](x) - last[0](x)).abs().max() > 1e-3 * last[0](x).abs().max()
    plain, fixed = (mixer(torch.ones(1, 56, 56, 24, dtype=torch.float64).cumsum(1).sin()) for mixer in first)
    torch.testing.assert_close(fixed[:, 1:-1, 1:-1], plain[:, 1:-1, 1:-1])
    assert not torch.allclose(fixed[:, 0], plain[:, 0], rtol=1e-6)


# Costs.


def test_costs_are_measured_once(tmp_path, capsys):
    arguments = ["--cost", "--models", "transnext_pico:linear", "--rounds", 2]
    (first,) = evaluated(tmp_path, *arguments, "--sizes", 32)
    assert len(first["seconds"]) == len(first["processor_seconds"]) == 2
    assert 2**16 < first["peak_bytes"] < 2**30
    again, larger = evaluated(tmp_path, *arguments, "--sizes", 32, 64)
    assert again == first
    assert larger["size"] == 64
    out = capsys.readouterr().out
    assert "latency of an image (ms)" in out
    assert "peak memory (MB)" in out


# Interruption.


def test_interrupted_and_continued(tmp_path):
    for seed in range(300):
        save(draw_image(seed, (16, 16)), tmp_path / "data" / SYNSETS[seed % 3], f"{seed:03}")
    arguments = ["--models", "transnext_pico", "--data", f"imagenet={tmp_path}/data", "--sizes", 64, "--batch-size", 1]
    arguments += RANDOM
    with start("evaluate.py", *arguments, "--output", tmp_path / "cut", stderr=-1, stdout=-1) as process:
        seen = ""
        while not re.search(r" [1-9]\d*/300", seen):  # some images are done
            letter = process.stderr.read(1)
            assert letter, seen
            seen += letter
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "The same command goes on" in err
    (row,) = json.loads((tmp_path / "cut" / "results.json").read_text())
    assert 0 < row["images"] < row["of"] == 300
    for name in ("cut", "whole"):
        assert example.main([*map(str, arguments), "--output", str(tmp_path / name)]) == 0
    cut, whole = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("cut", "whole"))
    assert cut == whole


def test_goes_on_from_the_images_that_a_row_has_counted(model, tmp_path):
    draw_data(model, tmp_path / "data", SIZE, list(range(1000)), SYNSETS.__getitem__)
    arguments = ["--models", MODEL, "--data", f"imagenet={tmp_path}/data", "--sizes", SIZE, "--batch-size", 4]
    (row,) = evaluated(tmp_path, *arguments)
    unfinished = row | {"images": 4, "top-1_hits": 100, "top-5_hits": 200}
    (tmp_path / "out" / "results.json").write_text(json.dumps([unfinished]))
    (resumed,) = evaluated(tmp_path, *arguments)
    assert resumed["images"] == 6
    assert 100 <= resumed["top-1_hits"] <= 102
    assert 200 <= resumed["top-5_hits"] <= 202


def test_a_kill_while_saving_leaves_the_old_results(tmp_path, monkeypatch):
    results = example.Results(tmp_path)
    results.row(model="a")["images"] = 1
    results.save()
    results.row(model="a")["images"] = 2
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        results.save()
    assert example.Results(tmp_path).rows == [{"model": "a", "images": 1}]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "nothing to do: give --data, --cost or both"),
        (["--cost", "--models", "transnext_huge"], "argument --models: timm knows no model 'transnext_huge'"),
        (["--cost", "--models", "transnext_pico:fast"], "argument --models: the options are linear, interpolate"),
        (["--cost", "--models", "resnet18:linear"], "argument --models: resnet18 is none of foveal's"),
        (["--data", "imagenet"], "argument --data: expected NAME=PATH, got 'imagenet'"),
        (["--data", "imagenet-o=x"], "argument --data: the names are imagenet,"),
        (["--data", "imagenet={tmp}/none"], "argument --data: no folder {tmp}/none"),
        (["--data", "imagenet={tmp}"], "argument --data: {tmp} holds the folder bad"),
        (["--data", "imagenet={tmp}/cats"], "argument --data: Couldn't find any class folder"),
        (["--data", "folder={tmp}"], "argument --data: Found no valid file for the class"),
        (["--cost", "--sizes", "0"], "argument --sizes: must be at least 1"),
        (["--cost", "--checkpoint", "resnet18=x"], "argument --checkpoint: resnet18 is not among --models"),
        (
            ["--data", "folder={tmp}/own", "--checkpoint", "transnext_tiny=no.pth"],
            "argument --checkpoint: there is no file no.pth",
        ),
        (["--data", "folder={tmp}/bad"], "cannot identify image file <_io.BufferedReader name='{tmp}/bad/a/a.png'>"),
        (["--cost", "--device", "abacus"], "argument --device: "),
    ],
)
def test_errors_name_the_argument(args, message, tmp_path, capsys):
    (tmp_path / "cats").mkdir()
    save(draw_image(0), tmp_path / "own" / "a", "a")
    save(draw_image(0), tmp_path / "bad" / "a", "a")
    (tmp_path / "bad" / "a" / "a.png").write_text("no image")
    with pytest.raises(SystemExit) as exit_info:
        example.main(
            [*(arg.format(tmp=tmp_path) for arg in args), "--output", str(tmp_path / "out"), "--random-weights"]
        )
    assert exit_info.value.code == 2
    assert message.format(tmp=tmp_path) in capsys.readouterr().err


def test_published_weights_do_not_get_a_random_head(tmp_path, capsys):
    save(draw_image(0), tmp_path / "own" / "a", "a")
    with pytest.raises(SystemExit):
        example.main(["--data", f"folder={tmp_path / 'own'}", "--output", str(tmp_path / "out")])
    assert "the published weights know 1000 classes and the folder has 1" in capsys.readouterr().err
