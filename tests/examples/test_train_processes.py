"""Training in two processes on the CPU: the numbers of one, whatever is killed meanwhile."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.examples.running import ENVIRONMENT, EXAMPLES
from tests.examples.training_runs import SMALL, as_finished_ran, assert_same_end, checkpoint, curve, stop_at

# Sums of float32 gradients in another order: 2^-24 a term, which 22 steps of training may stretch a hundredfold.
ROUNDING = 1e-5


def start_two(log: Path, *args) -> subprocess.Popen:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "--max-restarts", "1", str(EXAMPLES / "train.py"), *map(str, args)]
    with log.open("w") as sink:
        return subprocess.Popen(command, env=ENVIRONMENT, stdout=sink, stderr=sink)


def run_two(log: Path, *args) -> str:
    process = start_two(log, *args)
    assert process.wait(300) == 0, log.read_text()
    return log.read_text()


def assert_same_curve(folder, other):
    lines, others = curve(folder), curve(other)
    assert len(lines) == len(others) == 24
    for line, same in zip(lines, others, strict=True):
        assert line == pytest.approx(same, rel=ROUNDING)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A run of two processes that nothing disturbs."""
    folder = tmp_path_factory.mktemp("two") / "run"
    said = run_two(folder.parent / "log", *SMALL, "--output", folder)
    return folder, said


def test_two_processes_learn_what_one_does(two, finished):
    folder, said = two
    assert_same_curve(folder, finished[0])
    assert said.count("Held-out accuracy") == 1  # one process speaks for both
    assert load_file(folder / "model.safetensors").keys() == load_file(finished[0] / "model.safetensors").keys()


def wait_for_the_second_epoch(process: subprocess.Popen, log: Path):
    deadline = time.monotonic() + 240
    while "epoch=2" not in log.read_text() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)


def kill_a_process_of(torchrun: subprocess.Popen):
    children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the process to kill in /proc")
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_a_killed_process_costs_nothing(engine, two, finished, tmp_path):
    """torchrun starts both again, and they go on from the last checkpoint."""
    folder, log = tmp_path / "run", tmp_path / "log"
    process = start_two(log, *SMALL, "--save-every", "4", "--engine", engine, "--output", folder)
    wait_for_the_second_epoch(process, log)
    assert checkpoint(folder)["step"] < 22
    kill_a_process_of(process)
    assert process.wait(240) == 0, log.read_text()
    assert "exitcode: -9" in log.read_text()
    assert_same_curve(folder, finished[0])
    if engine == "ddp":
        assert_same_end(folder, two[0])


@pytest.mark.slow
def test_ctrl_c_stops_both_after_the_same_step(tmp_path, two):
    folder, log = tmp_path / "run", tmp_path / "log"
    process = start_two(log, *SMALL, "--output", folder)
    wait_for_the_second_epoch(process, log)
    process.send_signal(signal.SIGINT)
    process.wait(120)
    assert log.read_text().count("Stopped after step") == 1
    step = checkpoint(folder)["step"]
    assert 11 < step < 22
    assert [line["step"] for line in curve(folder)] == [*range(1, 12), *range(11, step + 1)]


@pytest.mark.slow
def test_a_run_goes_on_in_another_number_of_processes(finished, train, tmp_path, monkeypatch):
    """Begun alone, continued in two processes as shards."""
    folder = tmp_path / "run"
    with monkeypatch.context() as patch, as_finished_ran():
        stop_at(train, patch, 14)
        assert train.main([*SMALL, "--output", str(folder)]) == 130
    assert checkpoint(folder)["step"] == 11
    run_two(tmp_path / "log", "--resume", folder, "--engine", "fsdp2")
    assert_same_curve(folder, finished[0])
