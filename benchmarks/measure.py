"""Timing in paired rounds, peak memory in a process of its own, and what machine it was."""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

Step = Callable[[], object]


@dataclass
class Timing:
    """Seconds of each round, in the order of the rounds."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def ratio_to(self, other: "Timing") -> float:
        """The median over rounds of the other's time by ours: how many times as fast we are, noise cancelled."""
        return statistics.median(b / a for a, b in zip(self.seconds, other.seconds, strict=True))


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


def paired(steps: Mapping[str, Step], *, rounds: int, device: str = "cpu", title: str = "") -> dict[str, Timing]:
    """Time every step once a round, in turn, so that a noisy machine slows all of them alike.

    Each step first runs twice untimed. Within a round, a step shorter than 20 ms is repeated and averaged.
    """
    repeats = {}
    for name, step in tqdm(steps.items(), desc=f"{title}: warm-up", leave=False):
        step()
        repeats[name] = max(1, round(0.02 / _seconds(step, 1, device)))
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    with tqdm(total=rounds * len(steps), desc=title, leave=False) as bar:
        for _ in range(rounds):
            for name, step in steps.items():
                bar.set_postfix_str(name)
                seconds[name].append(_seconds(step, repeats[name], device))
                bar.update()
    return {name: Timing(values) for name, values in seconds.items()}


def _seconds(step: Step, repeats: int, device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    synchronize(device)
    return (time.perf_counter() - start) / repeats


def peak_memory(step: Step, device: str = "cpu") -> int:
    """Bytes that a step takes at its peak above what was held before. On the CPU, call it in a fresh process."""
    if device != "cpu":
        torch.accelerator.reset_peak_memory_stats()
        before = torch.accelerator.memory_allocated()
        step()
        synchronize(device)
        return torch.accelerator.max_memory_allocated() - before
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # starts the high-water mark again
    step()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{field} is not in /proc/self/status")


def in_fresh_process(module: str, *arguments: str) -> dict:
    """Run a module of the benchmarks and read the JSON on the last line that it prints."""
    command = [sys.executable, "-m", module, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr[-2000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def machine(device: str) -> dict[str, object]:
    """What a reader must know of the machine to read the figures."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
        flags = next((line for line in lines if line.startswith("flags")), "")
        cpu += " with " + ", ".join(f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in flags.split())
    return {
        "device": cpu if device == "cpu" else torch.cuda.get_device_name(),
        "threads": torch.get_num_threads(),
        "huge pages": os.environ.get("THP_MEM_ALLOC_ENABLE") == "1",  # for all tensors of 2 MB and more
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
