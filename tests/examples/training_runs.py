"""Runs of the training example, and the comparison of two."""

import json
import signal
from contextlib import contextmanager

import torch
from safetensors.torch import load_file

import foveal
from tests.examples.running import load
from training.interrupt import Interrupt, Stopped

SMALL = ("--img-size", "16", "--epochs", "2", "--batch-size", "128", "--micro-batch", "64")


@contextmanager
def training_example():
    """The example as a module; it takes over Ctrl-C and SIGTERM, which this gives back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield load("train")
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def curve(folder) -> list[dict[str, float]]:
    """The log of a run, but for the time it took."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "images_per_second"} for line in lines]


def assert_same_end(folder, other):
    """To the bit: weights, optimiser, history and log."""
    weights, others = load_file(folder / "model.safetensors"), load_file(other / "model.safetensors")
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    state, other_state = checkpoint(folder), checkpoint(other)
    assert state["history"] == other_state["history"]
    assert state["step"] == other_state["step"]
    for name, moments in state["optimizer"]["state"].items():
        assert all(torch.equal(value, other_state["optimizer"]["state"][name][key]) for key, value in moments.items())
    assert curve(folder) == curve(other)


def stop_at(train, monkeypatch, check: int):
    """Ctrl-C at the n-th place where it is looked at."""
    checks = iter(range(check + 1))

    class Countdown(Interrupt):
        def check(self):
            if next(checks, None) == check:
                raise Stopped

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
