"""The training example: what it writes, that it learns, and that a stopped run goes on as if it had not been."""

import pickle
import re
import signal
import time
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import foveal
from tests.examples.running import colourful, load, run, start

SMALL = ("--img-size", "16", "--epochs", "2", "--batch-size", "128")


@pytest.fixture
def train():
    """The example as a module; it takes over Ctrl-C, which the test gives back."""
    handler = signal.getsignal(signal.SIGINT)
    yield load("train")
    signal.signal(signal.SIGINT, handler)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    out, err = run("train.py", *SMALL, "--output", folder)
    return folder, out, err


def checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def assert_same_end(folder, other):
    weights, others = load_file(folder / "model.safetensors"), load_file(other / "model.safetensors")
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    state, other_state = checkpoint(folder), checkpoint(other)
    assert state["history"] == other_state["history"]
    assert state["step"] == other_state["step"]
    for name, moments in state["optimizer"]["state"].items():
        assert all(torch.equal(value, other_state["optimizer"]["state"][name][key]) for key, value in moments.items())


def test_writes_its_results(finished, train):
    folder, out, err = finished
    history = checkpoint(folder)["history"]
    assert len(history) == 2
    assert history[-1]["test_accuracy"] > 0.6
    assert f"Held-out accuracy {history[-1]['test_accuracy']:.2%}" in out
    assert re.search(r"[\d.]+ images/s.*accuracy=[\d.]+%.*loss=[\d.]+", err)
    net = train.small_backbone(16, num_classes=10, in_chans=1).eval()
    net.load_state_dict(load_file(folder / "model.safetensors"))
    digits = train.Digits("test", 16)
    images = torch.stack([digits[i][0] for i in range(len(digits))])
    with torch.no_grad():
        hits = (net(images).argmax(1) == torch.tensor(digits.labels)).float().mean()
    assert abs(hits - history[-1]["test_accuracy"]) < 1e-6
    assert colourful(folder / "receptive_field.png") > 0.3
    assert 0 < colourful(folder / "curve.png") < 0.3
    assert not list(folder.glob("*.tmp"))


def test_ctrl_c_and_resume_end_in_the_same_weights(finished, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    with log.open("w") as sink, start("train.py", *SMALL, "--output", folder, stdout=sink, stderr=sink) as process:
        deadline = time.monotonic() + 240
        while "epoch=2" not in log.read_text() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    assert f"--resume {folder}" in log.read_text()
    stopped = checkpoint(folder)
    assert len(stopped["history"]) == 1
    assert 11 < stopped["step"] < 22
    assert not (folder / "model.safetensors").exists()

    run("train.py", "--resume", folder)
    assert_same_end(folder, finished[0])


def stop_at(train, monkeypatch, check: int):
    """Ctrl-C at the n-th place where it is looked at."""
    checks = iter(range(check + 1))

    class Countdown(train.Interrupt):
        def check(self):
            if next(checks, None) == check:
                raise train.Stopped

    monkeypatch.setattr(train, "Interrupt", Countdown)


@contextmanager
def as_finished_ran():
    """One thread and the reference ops, as in the process of `finished`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with foveal.ops.backend("reference"):
            yield
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("check", [0, 11], ids=["before the first step", "while testing"])
def test_resumes_from_anywhere(check, finished, train, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch, as_finished_ran():
        stop_at(train, patch, check)
        assert train.main([*SMALL, "--output", str(folder)]) == 130
        assert checkpoint(folder)["step"] == min(check, 11)
        patch.setattr(train, "Interrupt", load("train").Interrupt)
        assert train.main(["--resume", str(folder)]) == 0
    assert_same_end(folder, finished[0])


def test_a_second_ctrl_c_does_not_wait(train):
    interrupt = train.Interrupt()
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(train.Stopped):
        interrupt.check()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_checkpoint_is_whole_or_absent(finished, train, tmp_path, monkeypatch):
    """A disk that fills up while writing leaves the old checkpoint."""
    net = torch.nn.Linear(2, 2)
    path = tmp_path / "checkpoint.pt"
    saved = train.Run({}, net, torch.optim.AdamW(net.parameters()), step=7)
    saved.save(path)

    def fail(state, file):
        file.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(train.torch, "save", fail)
    with pytest.raises(OSError, match="no space"):
        saved.save(path)
    assert torch.load(path, weights_only=True)["step"] == 7


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--lr", "0.1"], "argument --lr: the run to resume has 0.002, got 0.1"),
        (["--img-size", "32"], "argument --img-size: the run to resume has 16, got 32"),
        (["--model", "resnet18"], "argument --model: the run to resume has None, got resnet18"),
        (["--data", "cifar100", "x"], "argument --data: the run to resume has ['digits']"),
        (["--output", "elsewhere"], "argument --output: the run to resume has"),
    ],
)
def test_resume_refuses_other_settings(args, message, finished, train, capsys):
    with pytest.raises(SystemExit) as exit_info:
        train.main(["--resume", str(finished[0]), *args])
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--resume", "nowhere"], "argument --resume: nowhere holds no checkpoint.pt"),
        (["--data", "mnist"], "argument --data: expected digits, cifar100 PATH or folder PATH, got mnist"),
        (["--data", "folder"], "argument --data: expected"),
        (["--data", "digits", "x"], "argument --data: expected"),
        (["--data", "folder", "nowhere"], "argument --data: no folder nowhere/train"),
        (["--data", "cifar100", "nowhere"], "argument --data: no CIFAR-100 in nowhere"),
        (["--model", "transnext_huge"], "argument --model: timm knows no model 'transnext_huge'"),
        (["--model", "vgg11"], "argument --drop-path: vgg11 has no stochastic depth"),
        (["--epochs", "0"], "argument --epochs: must be at least 1"),
        (["--batch-size", "9999"], "argument --batch-size: must be at most the number of training images, 1437"),
        (["--output", "{finished}"], "argument --output: {finished} holds a run already"),
        (["--device", "cuda:99"], "argument --device: "),
        (["--device", "abacus"], "argument --device: "),
    ],
)
def test_errors_name_the_argument(args, message, finished, train, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_info:
        train.main([arg.format(finished=finished[0]) for arg in args])
    assert exit_info.value.code == 2
    assert message.format(finished=finished[0]) in capsys.readouterr().err


def test_every_run_gets_a_folder_of_its_own(train, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [train.parse_args([])[0].output.as_posix() for _ in range(3)]
    assert folders == ["runs/digits", "runs/digits-1", "runs/digits-2"]


def test_held_out_digits_stay_held_out(train):
    parts = {split: train.Digits(split, 8) for split in ("train", "test")}
    assert [len(part) for part in parts.values()] == [1437, 360]
    assert sorted(parts["test"].labels).count(3) in (36, 37)  # stratified: 183 of 1797 are threes
    images = {split: {image.numpy().tobytes() for image in part.images} for split, part in parts.items()}
    assert not images["train"] & images["test"]


def test_augmentation_follows_from_the_position_alone(train):
    digits = train.Digits("train", 16)
    once = [train.Augmented(digits, seed=1, epoch=2)[i][0] for i in (5, 6)]
    again = [train.Augmented(digits, seed=1, epoch=2)[i][0] for i in (6, 5)][::-1]
    assert all(map(torch.equal, once, again))
    for other in (train.Augmented(digits, seed=1, epoch=3), train.Augmented(digits, seed=2, epoch=2)):
        assert not torch.equal(once[0], other[5][0])


def write_folder(root, classes: dict[str, list[str]]):
    noise = np.random.default_rng(0)
    for split, names in classes.items():
        for name in names:
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(4):
                Image.fromarray(noise.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(folder / f"{i}.png")


def test_folder_of_images_with_workers_and_a_reference_variant(train, tmp_path):
    write_folder(tmp_path / "data", {"train": ["cat", "dog"], "val": ["cat", "dog"]})
    folder = tmp_path / "run"
    args = ["--model", "transnext_micro", "--img-size", "32", "--epochs", "1", "--batch-size", "4", "--workers", "1"]
    assert train.main(["--data", "folder", str(tmp_path / "data"), *args, "--output", str(folder)]) == 0
    assert checkpoint(folder)["step"] == 2
    assert load_file(folder / "model.safetensors")["head.fc.weight"].shape == (2, 384)
    assert colourful(folder / "receptive_field.png") > 0.1


def test_folder_with_other_classes_is_refused(train, tmp_path, capsys):
    write_folder(tmp_path, {"train": ["cat", "dog"], "val": ["cat", "fox"]})
    with pytest.raises(SystemExit):
        train.main(["--data", "folder", str(tmp_path), "--output", str(tmp_path / "run")])
    assert "train and val must hold the same classes, they differ in ['dog', 'fox']" in capsys.readouterr().err


def test_cifar100(train, tmp_path, monkeypatch):
    """A few images in the layout of the archive, with torchvision's check sums set aside."""
    from torchvision.datasets import CIFAR100

    noise = np.random.default_rng(0)
    (tmp_path / "cifar-100-python").mkdir()
    for name in ("train", "test"):
        images = noise.integers(0, 256, (6, 3072), dtype=np.uint8)
        entry = {"data": images, "fine_labels": list(range(6)), "coarse_labels": [0] * 6}
        (tmp_path / "cifar-100-python" / name).write_bytes(pickle.dumps(entry))
    names = {"fine_label_names": [f"class {i}" for i in range(100)]}
    (tmp_path / "cifar-100-python" / "meta").write_bytes(pickle.dumps(names))
    monkeypatch.setattr(CIFAR100, "train_list", [["train", None]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", None]])
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": None})

    folder = tmp_path / "run"
    args = ["--model", "test_convnext", "--epochs", "1", "--batch-size", "3", "--workers", "0"]
    assert train.main(["--data", "cifar100", str(tmp_path), *args, "--output", str(folder)]) == 0
    assert checkpoint(folder)["step"] == 2
    assert load_file(folder / "model.safetensors")["head.fc.weight"].shape[0] == 100


@pytest.mark.parametrize(
    ("name", "size"), [("convnext_atto", 32), ("resnet18", 32), ("swin_tiny_patch4_window7_224", 224), ("test_vit", 64)]
)
def test_builds_peers(name, size, train, tmp_path):
    args, _ = train.parse_args(["--model", name, "--img-size", str(size), "--output", str(tmp_path)])
    net = train.build_model(args, num_classes=10, in_chans=1).eval()
    assert net(torch.randn(1, 1, size, size)).shape == (1, 10)


def test_a_reference_variant_is_declared_for_the_training_size(train, tmp_path):
    args, _ = train.parse_args(["--model", "transnext_micro", "--img-size", "64", "--output", str(tmp_path)])
    net = train.build_model(args, num_classes=10, in_chans=3)
    assert net.stages[0].blocks[0].mixer.pretrain_grid == (16, 16)
    assert max(block.drop_path.drop_prob for block in net.stages[3].blocks) == pytest.approx(0.1)
