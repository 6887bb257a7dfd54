"""The detection example: its detectors, its data, what it writes."""

import json
import re

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from foveal.blocks import AggregatedAttention
from tests.examples.running import colourful, load, run
from tests.models.test_checkpoints import official

pytest.importorskip("pycocotools")

QUICK = ("--size", "64", "--images", "8", "--batch-size", "4", "--epochs", "1")


@pytest.fixture(scope="module")
def example():
    return load("detect")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    out, err = run("detect.py", *QUICK, "--output", folder)
    return folder, out, err


def detector(example, *args, classes=4):
    torch.manual_seed(0)
    return example.build_detector(example.parse_args(["--size", "64", "--output", "unused", *args]), classes)


def test_writes_its_results_and_starts_from_them(finished, tmp_path):
    folder, out, err = finished
    assert re.search(r"box AP [\d.]+%.*\nmask AP [\d.]+%.*on 6 held-out images", out)
    assert re.search(r"2/2 .*epoch=1, loss=[\d.]+", err)
    assert colourful(folder / "predictions.png") > 0.05
    again, _ = run(
        "detect.py", *QUICK[:-1], "0", "--weights", folder / "model.safetensors", "--output", tmp_path / "again"
    )
    assert re.findall("AP.*", again) == re.findall("AP.*", out)
    weights, others = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "again"))
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def test_reads_what_it_draws(finished, example):
    """Boxes enclose the masks, and the data set reads like any of COCO's."""
    root = finished[0] / "shapes"
    data = example.prepared(example.open_coco(root, "train"), masks=True, training=False)
    assert len(data) == 8
    for image, target in data:
        assert image.shape == (3, 64, 64)
        assert set(target["labels"].tolist()) <= {1, 2, 3}
        for box, mask in zip(target["boxes"], target["masks"], strict=True):
            rows, columns = mask.nonzero(as_tuple=True)
            extent = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            assert (box - extent).abs().max() <= 2


def test_perfect_detections_score_one(finished, example):
    coco = example.open_coco(finished[0] / "shapes", "val").coco
    perfect = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": 0.9}
        for a in coco.dataset["annotations"]
    ]
    assert example.average_precision(coco, perfect, "bbox") == pytest.approx((1.0, 1.0))
    wrong = [{**r, "category_id": r["category_id"] % 3 + 1} for r in perfect]
    assert example.average_precision(coco, wrong, "bbox")[0] < 0.2


def test_crowds_and_empty_boxes_are_no_targets(finished, example, tmp_path):
    root = tmp_path / "coco"
    example.draw_shapes(root, "train", 3, 64, seed=0)
    file = root / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    for objects in content["annotations"]:
        if objects["image_id"] == 1:
            objects["iscrowd"] = 1
        if objects["image_id"] == 2:
            objects["bbox"][2] = 0
    file.write_text(json.dumps(content))
    kept = example.prepared(example.open_coco(root, "train"), masks=False, training=True)
    assert [target["image_id"] for _, target in kept] == [3]


@pytest.mark.parametrize("kind", ["maskrcnn", "retinanet"])
def test_pyramid_is_that_of_the_models_maps(kind, example):
    net = detector(example, "--detector", kind).eval()
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        maps = net.backbone.body(x)
        expected = net.backbone.fpn({str(i): m for i, m in enumerate(maps)})
        actual = net.backbone(x)
    strides = [4, 8, 16, 32, 64] if kind == "maskrcnn" else [8, 16, 32, 64, 128]
    for (name, level), stride in zip(actual.items(), strides, strict=True):
        assert torch.equal(level, expected[name])
        assert level.shape[2:] == (-(-64 // stride), -(-96 // stride))


def test_frozen_stages_stand_still(example):
    net = detector(example, "--detector", "retinanet", "--frozen-stages", "2", "--drop-path", "0.5").train()
    stages = net.backbone.body.model.stages
    assert [stage.training for stage in stages] == [False, False, True, True]
    frozen = {name for name, p in net.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, _ in net.named_parameters() if ".stages.0." in name or ".stages.1." in name}
    images = [torch.rand(3, 64, 64)] * 2
    targets = [{"boxes": torch.tensor([[5.0, 5.0, 40.0, 50.0]]), "labels": torch.tensor([1])}] * 2
    sum(net(images, targets).values()).backward()
    for name, parameter in net.named_parameters():
        assert (parameter.grad is None) == (name in frozen), name


def test_layer_decay_covers_every_stage(example):
    net = detector(example)
    groups = example.parameter_groups(net, weight_decay=0.05, layer_decay=0.8)
    scale = {id(p): group.get("lr_scale", 1.0) for group in groups for p in group["params"]}
    assert scale.keys() == {id(p) for p in net.parameters()}
    assert sum(len(group["params"]) for group in groups) == len(scale)
    stages = net.backbone.body.model.stages
    along = [scale[id(stage.blocks[-1].mlp.fc1.weight)] for stage in stages]
    assert along == sorted(set(along))
    assert scale[id(net.backbone.fpn.inner_blocks[0][0].weight)] == 1.0
    assert scale[id(stages[0].downsample.proj.weight)] < along[0]
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert decays[id(stages[0].blocks[0].mixer.temperature)] == 0
    assert decays[id(stages[0].blocks[0].mixer.qkv.weight)] == 0.05


def test_grad_checkpointing_and_the_kind_of_bias(example):
    net = detector(example, "--grad-checkpointing", "--interpolate-bias")
    assert all(stage.grad_checkpointing for stage in net.backbone.body.model.stages)
    mixers = [m for m in net.modules() if isinstance(m, AggregatedAttention)]
    assert {m.bias_resampling for m in mixers} == {"interpolate"}
    assert mixers[0].bias_grid == (16, 16)
    plain = detector(example, "--interpolate-bias", "--drop-path", "0").train()
    net = detector(example, "--grad-checkpointing", "--interpolate-bias", "--drop-path", "0").train()
    x = torch.randn(1, 3, 64, 64)
    for parameters in zip(*(m.backbone.body.parameters() for m in (plain, net)), strict=True):
        assert torch.equal(*parameters)
    for m in (plain, net):
        m.backbone(x)["0"].square().sum().backward()
    for a, b in zip(plain.backbone.body.parameters(), net.backbone.body.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_backbone_weights_of_a_detector_load_by_their_prefix(example, tmp_path):
    """In the official layout with a neck beside it, and from a classifier of foveal's."""
    model = detector(example).backbone.body.model
    weights = {f"backbone.{name}": value for name, value in official(model).items()}
    torch.save({"state_dict": {**weights, "neck.conv.weight": torch.zeros(3)}}, tmp_path / "detector.pth")
    save_file({**model.state_dict(), "head.fc.bias": torch.zeros(3)}, tmp_path / "classifier.safetensors")
    for file in ("detector.pth", "classifier.safetensors"):
        torch.manual_seed(1)
        other = example.build_detector(
            example.parse_args(["--size", "64", "--output", "x", "--backbone-weights", str(tmp_path / file)]), 4
        )
        for a, b in zip(model.parameters(), other.backbone.body.model.parameters(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "resnet18"], "argument --model: must be a TransNeXt (transnext_"),
        (["--coco", "nowhere"], "argument --coco: there is no nowhere/train2017"),
        (["--batch-size", "99"], "argument --batch-size: must be at most the number of training images, 8"),
        (["--weights", "nowhere"], "argument --weights: there is no file nowhere"),
        (["--backbone-weights", "nowhere"], "argument --backbone-weights: there is no file nowhere"),
        (["--frozen-stages", "5"], "argument --frozen-stages: invalid choice"),
        (["--size", "16"], "argument --size: must be at least 32, got 16"),
        (["--device", "abacus"], "argument --device: "),
    ],
    ids=str,
)
def test_errors_name_the_argument(args, message, example, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_info:
        example.main([*QUICK, "--output", "run", *args])
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_picture(finished):
    assert Image.open(finished[0] / "predictions.png").size == (1210, 825)
