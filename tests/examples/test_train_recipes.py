"""The training example's recipes, by what they do: model, optimiser, learning rate, augmentation, precision."""

import pytest
import torch
from timm.data.auto_augment import RandAugment
from timm.data.random_erasing import RandomErasing
from torch import nn
from torch.nn import functional as F
from torchvision.transforms import ColorJitter

from tests.examples.test_train_data import write_folder
from tests.examples.training_runs import as_finished_ran, assert_same_end, checkpoint, curve, stop_at, training_example
from training.arguments import parse_args
from training.data import open_data
from training.model import build_model, build_optimizer, build_scheduler
from training.recipes import RECIPES


@pytest.mark.parametrize(
    ("name", "size"), [("convnext_atto", 32), ("resnet18", 32), ("swin_tiny_patch4_window7_224", 224), ("test_vit", 64)]
)
def test_builds_peers(name, size, tmp_path):
    args, _ = parse_args(["--model", name, "--img-size", str(size), "--output", str(tmp_path)])
    net = build_model(args, num_classes=10, in_chans=1).eval()
    assert net(torch.randn(1, 1, size, size)).shape == (1, 10)


def test_a_reference_variant_is_declared_for_the_training_size(tmp_path):
    args, _ = parse_args(["--model", "transnext_micro", "--img-size", "64", "--output", str(tmp_path)])
    net = build_model(args, num_classes=10, in_chans=3)
    assert net.stages[0].blocks[0].mixer.pretrain_grid == (16, 16)
    assert max(block.drop_path.drop_prob for block in net.stages[3].blocks) == pytest.approx(0.1)


def paper(tmp_path, *options):
    """The arguments of a TransNeXt-Small after the paper."""
    write_folder(tmp_path / "data", {"train": ["cat", "dog"], "val": ["cat", "dog"]})
    data = ["--data", "folder", str(tmp_path / "data"), "--output", str(tmp_path / "run")]
    return parse_args(["--model", "transnext_small", *data, *options])[0]


def learning_rates(args, steps: int) -> list[float]:
    optimizer = torch.optim.AdamW(nn.Linear(1, 1).parameters(), lr=args.lr)
    scheduler = build_scheduler(args, optimizer, steps)
    rates = []
    for step in range(args.epochs * steps):
        scheduler.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


def test_table_4(tmp_path):
    args = paper(tmp_path, "--recipe", "imagenet")
    rates = learning_rates(args, steps=10)
    assert len(rates) == 3000
    assert rates[0] == pytest.approx(1e-6)
    assert max(rates) == rates[50] == pytest.approx(1e-3, rel=1e-3)
    assert rates[-1] == pytest.approx(1e-5, rel=1e-3)
    assert (args.batch_size, args.drop_path, args.label_smoothing, args.clip_norm) == (1024, 0.45, 0.1, 1.0)
    assert (args.mixup, args.cutmix, args.repeats) == (0.8, 1.0, 3)
    steps = open_data(args).train.transform.transforms
    (augment,) = (step for step in steps if isinstance(step, RandAugment))
    assert len(augment.ops) > 10
    (erasing,) = (step for step in steps if isinstance(step, RandomErasing))
    assert (erasing.probability, erasing.per_pixel) == (0.25, True)


def test_fine_tuning_at_384(tmp_path):
    args = paper(tmp_path, "--recipe", "imagenet-384")
    assert learning_rates(args, steps=10) == [pytest.approx(1e-5)] * 50
    assert (args.img_size, args.pretrain_size, args.drop_path, args.cutmix) == (384, 224, 0.7, 0.0)
    image, _ = open_data(args).test[0]
    assert image.shape == (3, 384, 384)


def test_every_rate_of_drop_path_belongs_to_a_variant():
    for recipe in ("imagenet", "imagenet-384"):
        for name, rate in RECIPES[recipe]["drop_path"].items():
            args = parse_args(["--model", name, "--drop-path", str(rate), "--output", "unused"])[0]
            assert args.model == name


def test_small_photos_keep_their_colour_jitter(tmp_path):
    assert any(isinstance(step, ColorJitter) for step in open_data(paper(tmp_path)).train.transform.transforms)


def test_what_must_not_decay_does_not(tmp_path):
    args = parse_args(["--output", str(tmp_path), "--layer-decay", "0.5"])[0]
    net = build_model(args, num_classes=10, in_chans=1)
    groups = build_optimizer(args, net).param_groups
    names = {parameter: name for name, parameter in net.named_parameters()}
    decay = {names[parameter]: group["weight_decay"] for group in groups for parameter in group["params"]}
    assert decay.keys() == set(names.values())
    exempt = {name for name in decay if name in net.no_weight_decay() or decay[name] == 0}
    assert exempt == {name for name, weight in decay.items() if weight == 0}
    assert any("query_embedding" in name for name in exempt)
    assert decay["head.fc.weight"] == 0.05
    scale = {names[parameter]: group["lr_scale"] for group in groups for parameter in group["params"]}
    assert scale["head.fc.weight"] == 1
    assert scale["stages.2.blocks.1.mlp.fc1.weight"] == 2 * scale["stages.2.blocks.0.mlp.fc1.weight"]


FULL = (
    *("--recipe", "imagenet", "--drop-path", "0.15", "--img-size", "16", "--epochs", "2", "--warmup-epochs", "0"),
    *("--batch-size", "4", "--micro-batch", "2", "--precision", "bfloat16", "--layer-decay", "0.9"),
    *("--grad-checkpointing", "--workers", "0"),
)


def test_a_stopped_run_of_the_full_recipe_ends_in_the_same_weights(train, tmp_path, monkeypatch):
    write_folder(tmp_path / "data", {"train": ["cat", "dog"], "val": ["cat", "dog"]})
    args = ["--data", "folder", str(tmp_path / "data"), *FULL]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    with as_finished_ran():
        assert train.main([*args, "--output", str(whole)]) == 0
        with monkeypatch.context() as patch:
            stop_at(train, patch, 1)
            assert train.main([*args, "--output", str(stopped)]) == 130
        assert train.main(["--resume", str(stopped), "--grad-checkpointing", "--workers", "0"]) == 0
    assert checkpoint(whole)["step"] == 4
    assert_same_end(stopped, whole)


def tiny_run(train, folder, *options) -> list[float]:
    """The losses of a few steps of the small backbone on noise."""
    photos = folder.parent / "photos"
    if not photos.exists():
        write_folder(photos, {"train": ["cat", "dog"], "val": ["cat", "dog"]})
    size = ["--img-size", "16", "--epochs", "3", "--batch-size", "4", "--drop-path", "0", "--workers", "0"]
    with as_finished_ran():
        assert train.main(["--data", "folder", str(photos), *size, *options, "--output", str(folder)]) == 0
    return [line["loss"] for line in curve(folder)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run in its simplest form, and its losses."""
    with training_example() as train:
        return tiny_run(train, tmp_path_factory.mktemp("plain") / "run")


@pytest.mark.parametrize(
    ("option", "tolerance"),
    [
        (("--micro-batch", "1"), 1e-5),
        (("--grad-checkpointing",), 1e-5),
        (("--precision", "float16"), 2e-2),  # 2^-11 for an operation, of which a logit is some dozens deep
    ],
    ids=["accumulation", "checkpointing", "float16"],
)
def test_how_it_runs_does_not_change_what_is_learnt(option, tolerance, plain, train, tmp_path):
    assert tiny_run(train, tmp_path / "run", *option) == pytest.approx(plain, rel=tolerance)
    assert bool(checkpoint(tmp_path / "run")["scaler"]) == ("float16" in option)


def test_compiled_it_learns_the_same(train, tmp_path, monkeypatch):
    """Without the code generator: graphs are traced, and run as they are."""
    calls, compile_model = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: calls.append(model) or compile_model(model, backend="eager"))
    model = ("--model", "test_vit", "--img-size", "32")
    plain = tiny_run(train, tmp_path / "plain", *model)
    assert not calls
    assert tiny_run(train, tmp_path / "run", *model, "--compile") == pytest.approx(plain, rel=1e-5)
    assert len(calls) == 1


def test_labels_are_mixed_in_training_alone(train, tmp_path, monkeypatch):
    seen, cross_entropy = [], F.cross_entropy

    def record(logits, labels, **kwargs):
        seen.append(labels)
        return cross_entropy(logits, labels, **kwargs)

    monkeypatch.setattr(F, "cross_entropy", record)
    tiny_run(train, tmp_path / "run", "--mixup", "0.8", "--cutmix", "1")
    mixtures, numbers = ([labels for labels in seen if labels.ndim == ndim] for ndim in (2, 1))
    assert len(mixtures) == len(numbers) == 6
    assert all(labels.shape == (4, 2) and torch.allclose(labels.sum(1), torch.ones(4)) for labels in mixtures)
    assert any(((labels > 0.01) & (labels < 0.99)).any() for labels in mixtures)


def test_tensorboard_gets_the_log(plain, train, tmp_path):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert tiny_run(train, tmp_path / "run", "--tensorboard") == plain
    events = accumulators.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    steps = [line for line in curve(tmp_path / "run") if "lr" in line]
    assert [event.value for event in events.Scalars("step/loss")] == pytest.approx([line["loss"] for line in steps])
    assert [event.step for event in events.Scalars("epoch/test_accuracy")] == [2, 4, 6]


def test_weights_to_start_from(tmp_path):
    """Fine-tuning takes all but a head of another size."""
    weights = tmp_path / "weights.pt"
    args = ["--model", "test_vit", "--img-size", "32", "--weights", str(weights), "--output", "unused"]
    args = parse_args(args)[0]
    base = build_model(args, num_classes=2, in_chans=3)
    torch.save(base.state_dict(), weights)
    for classes in (2, 5):
        net = build_model(args, num_classes=classes, in_chans=3, weights=True)
        for name, weight in net.state_dict().items():
            new = classes == 5 and name.startswith("head.")
            assert weight.shape[0] == 5 if new else torch.equal(weight, base.state_dict()[name])
    assert not torch.equal(build_model(args, 2, 3).head.weight, base.head.weight)
    torch.save({"head.weight": torch.ones(1)}, weights)
    with pytest.raises(SystemExit):
        build_model(args, num_classes=2, in_chans=3, weights=True)
