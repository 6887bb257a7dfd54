"""The training example's arguments: wrong ones get a sentence, and recipes are the paper's."""

import pytest

from tests.examples.training_runs import SMALL
from training.arguments import parse_args


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--lr", "0.1"], "argument --lr: the run to resume has 0.002, got 0.1"),
        (["--img-size", "32"], "argument --img-size: the run to resume has 16, got 32"),
        (["--model", "resnet18"], "argument --model: the run to resume has None, got resnet18"),
        (["--data", "cifar100", "x"], "argument --data: the run to resume has ['digits']"),
        (["--output", "elsewhere"], "argument --output: the run to resume has"),
        (["--precision", "bfloat16"], "argument --precision: the run to resume has float32, got bfloat16"),
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
        (
            ["--data", "mnist"],
            "argument --data: expected digits, cifar100 PATH, folder PATH, shards PATH or hfds/NAME, got mnist",
        ),
        (["--data", "folder"], "argument --data: expected"),
        (["--data", "digits", "x"], "argument --data: expected"),
        (["--data", "folder", "nowhere"], "argument --data: no folder nowhere/train"),
        (["--data", "cifar100", "nowhere"], "argument --data: no CIFAR-100 in nowhere"),
        (["--model", "transnext_huge"], "argument --model: timm knows no model 'transnext_huge'"),
        (["--model", "vgg11"], "argument --drop-path: vgg11 has no stochastic depth"),
        (["--epochs", "0"], "argument --epochs: must be at least 1"),
        (["--batch-size", "9999"], "argument --batch-size: must be at most the number of training images, 1437"),
        (["--auto-augment", "rand-m9"], "argument --auto-augment: digits have an augmentation of their own"),
        (["--recipe", "imagenet"], "argument --auto-augment: digits have an augmentation of their own"),
        (["--splits", "a", "b"], "argument --splits: digits has its own, got a b"),
        (
            ["--data", "folder", "x", "--recipe", "imagenet"],
            "argument --drop-path: the recipe has one for transnext_micro",
        ),
        (
            ["--data", "folder", "x", "--recipe", "digits"],
            "argument --recipe: digits has no augmentation of photographs, which folder needs",
        ),
        (["--weights", "hub"], "argument --weights: needs a --model that they belong to"),
        (
            ["--model", "test_vit", "--img-size", "64", "--weights", "nowhere"],
            "argument --weights: there is no file nowhere",
        ),
        (["--lr", "1e-5"], "argument --min-lr: must be at most --lr 1e-05, got 2e-05"),
        (["--micro-batch", "48"], "argument --micro-batch: --batch-size 64 must be a multiple of 48 x 1 processes"),
        (["--micro-batch", "1", "--mixup", "0.8"], "argument --micro-batch: --mixup and --cutmix pair images"),
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


def test_every_run_gets_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [parse_args([])[0].output.as_posix() for _ in range(3)]
    assert folders == ["runs/digits", "runs/digits-1", "runs/digits-2"]


def test_a_restarted_run_goes_on(finished, tmp_path, monkeypatch, capsys):
    """torchrun starts the same command again: it resumes, or begins where there is nothing to resume."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    args, state = parse_args([*SMALL, "--output", str(finished[0])])
    assert args.resume == args.output == finished[0]
    assert state["step"] == 22
    assert parse_args(["--output", str(tmp_path)])[1] is None
    with pytest.raises(SystemExit):
        parse_args([])
    assert "argument --output: must be given" in capsys.readouterr().err
