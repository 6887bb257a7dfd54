"""What a forward pass costs on this machine: time in paired rounds, and peak memory in a process of its own.

A part of evaluate.py, which gives it the models and the image sizes.
"""

import multiprocessing
import platform
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")  # of Linux


def machine(device: str) -> dict[str, object]:
    """What a reader of the figures must know."""
    name = platform.processor() or platform.machine()
    if torch.device(device).type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), name)
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


Times = dict[str, list[float]]


def paired_times(models: Mapping[str, nn.Module], images: Tensor, rounds: int) -> dict[str, Times]:
    """Seconds of a forward pass in every round, by the clock and, on the CPU, of the processor.

    The models take turns, so that a noisy machine slows all of them. The processor's seconds are those of all threads;
    with one thread and an idle machine they are the clock's, and on a busy machine they tell more.
    """
    with torch.inference_mode():
        for model in models.values():
            model(images)  # what is kept per size, such as position biases, is made here
        measured = [{name: _times(model, images) for name, model in models.items()} for _ in range(rounds)]
    clocks = ("seconds", "processor_seconds") if images.device.type == "cpu" else ("seconds",)
    return {name: {clock: [times[name][i] for times in measured] for i, clock in enumerate(clocks)} for name in models}


def _times(model: nn.Module, images: Tensor) -> tuple[float, float]:
    _synchronize(images)
    start, processor_start = time.perf_counter(), time.process_time()
    model(images)
    _synchronize(images)
    return time.perf_counter() - start, time.process_time() - processor_start


def _synchronize(images: Tensor) -> None:
    if images.device.type != "cpu":
        torch.accelerator.synchronize()


def peak_memory(build: Callable[[], nn.Module], images: Tensor, prepare: Callable[[], None]) -> int | None:
    """Bytes that a forward pass takes at its peak, above model and images; None where nothing can tell.

    It runs in a fresh process, for on the CPU memory once used is not always given back. There ``prepare`` runs first,
    and then ``build``; both must be picklable.
    """
    if images.device.type == "cpu" and not CLEAR.exists():
        return None
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=prepare) as process:
        return process.submit(_peak_memory, build, images.shape, images.dtype, str(images.device)).result()


def _peak_memory(build: Callable[[], nn.Module], shape: torch.Size, dtype: torch.dtype, device: str) -> int:
    model, images = build(), torch.randn(shape, dtype=dtype, device=device)
    with torch.inference_mode():
        if images.device.type == "cuda":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            model(images)
            return torch.cuda.max_memory_allocated() - before
        before = _resident("VmRSS")
        CLEAR.write_text("5")  # starts the high-water mark again
        model(images)
        return max(0, _resident("VmHWM") - before)


def _resident(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
