"""The training example: what it writes, that it learns, and that a stopped run goes on as if it had not been."""

import re
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from tests.examples.running import colourful, start
from tests.examples.training_runs import SMALL, as_finished_ran, assert_same_end, checkpoint, stop_at
from training import checkpoint as checkpoint_module
from training.checkpoint import Run
from training.digits import Digits
from training.interrupt import Interrupt, Stopped
from training.model import small_backbone


def test_writes_its_results(finished):
    folder, out, err = finished
    history = checkpoint(folder)["history"]
    assert len(history) == 2
    assert history[-1]["test_accuracy"] > 0.6
    assert f"Held-out accuracy {history[-1]['test_accuracy']:.2%}" in out
    assert re.search(r"[\d.]+ images/s.*accuracy=[\d.]+%.*loss=[\d.]+", err)
    net = small_backbone(16, num_classes=10, in_chans=1).eval()
    net.load_state_dict(load_file(folder / "model.safetensors"))
    digits = Digits("test", 16)
    images = torch.stack([digits[i][0] for i in range(len(digits))])
    with torch.no_grad():
        hits = (net(images).argmax(1) == torch.tensor(digits.labels)).float().mean()
    assert abs(hits - history[-1]["test_accuracy"]) < 1e-6
    assert colourful(folder / "receptive_field.png") > 0.3
    assert 0 < colourful(folder / "curve.png") < 0.3
    assert not list(folder.glob("*.tmp"))


def start_and_wait_for(text: str, folder, *args):
    """A run in a process of its own that has said so much, and what it says."""
    log = folder.parent / "log"
    with log.open("w") as sink:
        process = start("train.py", *SMALL, *args, "--output", folder, stdout=sink, stderr=sink)
    deadline = time.monotonic() + 240
    while text not in log.read_text() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    return process, log


def test_ctrl_c_and_resume_end_in_the_same_weights(finished, train, tmp_path):
    folder = tmp_path / "run"
    process, log = start_and_wait_for("epoch=2", folder)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert f"--resume {folder}" in log.read_text()
    stopped = checkpoint(folder)
    assert len(stopped["history"]) == 1
    assert 11 < stopped["step"] < 22
    assert not (folder / "model.safetensors").exists()

    with as_finished_ran():
        assert train.main(["--resume", str(folder)]) == 0
    assert_same_end(folder, finished[0])


def test_a_killed_run_goes_on_from_its_last_checkpoint(finished, train, tmp_path):
    folder = tmp_path / "run"
    process, _ = start_and_wait_for("epoch=2", folder, "--save-every", "4")
    process.kill()
    process.wait(60)
    assert checkpoint(folder)["step"] in (11, 12, 16, 20)

    with as_finished_ran():
        assert train.main(["--resume", str(folder)]) == 0
    assert_same_end(folder, finished[0])


@pytest.mark.parametrize("check", [0, 11], ids=["before the first step", "while testing"])
def test_resumes_from_anywhere(check, finished, train, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch, as_finished_ran():
        stop_at(train, patch, check)
        assert train.main([*SMALL, "--output", str(folder)]) == 130
        assert checkpoint(folder)["step"] == min(check, 11)
        patch.setattr(train, "Interrupt", Interrupt)
        assert train.main(["--resume", str(folder)]) == 0
    assert_same_end(folder, finished[0])


@pytest.mark.usefixtures("train")
def test_a_second_ctrl_c_does_not_wait():
    interrupt = Interrupt()
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(Stopped):
        interrupt.check()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_checkpoint_is_whole_or_absent(tmp_path, monkeypatch):
    """A disk that fills up while writing leaves the old checkpoint."""
    net = torch.nn.Linear(2, 2)
    path = tmp_path / "checkpoint.pt"
    saved = Run({}, net, torch.optim.AdamW(net.parameters()), step=7)
    saved.save(path)

    def fail(state, file):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(checkpoint_module.torch, "save", fail)
    with pytest.raises(OSError, match="no space"):
        saved.save(path)
    assert torch.load(path, weights_only=True)["step"] == 7
