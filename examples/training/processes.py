"""One process or many: who we are, what all agree on, and how the model is shared out.

torchrun tells each process its rank and the number of them in environment variables; without it a run is one process,
and every function here does the obvious thing.
"""

import os
import re
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")


def join() -> None:
    """Meet the other processes, where torchrun started some: over gloo on CPUs and NCCL on GPUs."""
    if "RANK" not in os.environ:
        return
    # The addresses that processes leave in torchrun's store outlive them: a restart must not read those of the dead.
    store, number, size = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=number, world_size=size)


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def own_device(name: str) -> torch.device:
    """The device of this process: its own of the machine's GPUs where there are several processes."""
    device = torch.device(name)
    if device.type == "cuda" and world_size() > 1:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    return device


def from_first(choose: Callable[[], T]) -> T:
    """What the first process chooses, in all of them."""
    if world_size() == 1:
        return choose()
    box = [choose() if rank() == 0 else None]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def add_up(tensor: Tensor) -> Tensor:
    """The sum over the processes of a tensor on the CPU."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def any_of(flag: bool) -> bool:
    """Whether the flag is set in any process."""
    return bool(add_up(torch.tensor(float(flag))))


def distribute(model: nn.Module, engine: str, compile_it: bool) -> nn.Module:
    """The model to call: each process has a copy (ddp), or a part of every tensor (fsdp2), gathered block by block."""
    if engine == "fsdp2" and world_size() > 1:
        mesh = init_device_mesh(next(model.parameters()).device.type, (world_size(),))
        for name, module in model.named_modules():
            if re.search(r"(^|\.)blocks\.\d+$", name):
                if compile_it:
                    module.compile()
                fully_shard(module, mesh=mesh)
        return fully_shard(model, mesh=mesh)
    network = torch.compile(model) if compile_it else model
    if world_size() == 1:
        return network
    # A depthwise weight (C, 1, 3, 3) lies in memory in one way that two sets of strides describe.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    return DistributedDataParallel(network)


def accumulating(model: nn.Module, last: bool) -> AbstractContextManager:
    """Gradients travel between the processes with the last micro-batch of a step only."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext()
