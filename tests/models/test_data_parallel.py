"""DistributedDataParallel over two steps learns what one process learns: on the CPU, and on every GPU there is."""

import copy

import pytest
import timm
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import foveal  # noqa: F401 - registers the models

GPUS = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def learn_two_steps(model: nn.Module, x: torch.Tensor, target: torch.Tensor) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), target).backward()
        optimizer.step()
    return model


def work(rank: int, world: int, device_type: str, rendezvous: str, start: str, end: str) -> None:
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False
    device = torch.device(device_type, rank if device_type == "cuda" else None)
    if device_type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device_type == "cuda" else "gloo"
    distributed.init_process_group(backend, init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    model, x, target = torch.load(start, weights_only=False)
    model = DistributedDataParallel(model.to(device), device_ids=[rank] if device_type == "cuda" else None)
    learn_two_steps(model, x.chunk(world)[rank].to(device), target.chunk(world)[rank].to(device))
    if rank == 0:
        torch.save(model.module.cpu().state_dict(), end)
    distributed.destroy_process_group()


@pytest.mark.parametrize("device_type", ["cpu", pytest.param("cuda", marks=GPUS)])
def test_two_steps(device_type, tmp_path):
    world = torch.cuda.device_count() if device_type == "cuda" else 2
    model = timm.create_model("transnext_pico", num_classes=10).train()
    before = copy.deepcopy(model.state_dict())
    x, target = torch.randn(2 * world, 3, 64, 64), torch.randint(10, (2 * world,))
    torch.save((model, x, target), tmp_path / "start")
    paths = [str(tmp_path / name) for name in ("rendezvous", "start", "end")]
    torch.multiprocessing.spawn(work, (world, device_type, *paths), nprocs=world)
    found = torch.load(tmp_path / "end")
    with torch.backends.cudnn.flags(allow_tf32=False):
        alone = learn_two_steps(model.to(device_type), x.to(device_type), target.to(device_type)).cpu().state_dict()
    for name, value in alone.items():
        # Sums of float32 in another order, in the gradients of two steps; a gradient that is not averaged is far off.
        step = (value - before[name]).abs().max()
        assert (found[name] - value).abs().max() <= 1e-3 * step + 1e-6, name
