"""Tests of ops marked ``on_devices`` run on every device that has kernels: the CPU and, where there is one, a GPU."""

import pytest
import torch

from foveal.ops.backend import COMPILED_DTYPES
from foveal.ops.compiled import library
from tests.ops import cuda_emulator

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def pytest_generate_tests(metafunc):
    if metafunc.definition.get_closest_marker("on_devices"):
        metafunc.parametrize("device", DEVICES, indirect=True)


def pytest_collection_modifyitems(config, items):
    """Of the dtypes that a test is written for, each device has those that its kernels serve."""
    unserved = []
    for item in items:
        if item.get_closest_marker("on_devices"):
            dtype, device = (item.callspec.params.get(name) for name in ("dtype", "device"))
            if dtype is not None and dtype not in COMPILED_DTYPES[device]:
                unserved.append(item)
    config.hook.pytest_deselected(items=unserved)
    left_out = set(unserved)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(autouse=True)
def device(request):
    """The type of the device on which the test makes its tensors; the CPU unless the test is ``on_devices``."""
    device_type = getattr(request, "param", None)
    if device_type is None:
        yield "cpu"
        return
    if device_type == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    why_not = library.why_not("cuda:0" if device_type == "cuda" else "cpu")
    if why_not is not None:
        pytest.skip(why_not)
    with torch.backends.cudnn.flags(allow_tf32=False), torch.device(device_type):  # full float32 in the reference
        yield device_type


@pytest.fixture(scope="session")
def emulator():
    """The CUDA kernels on the host, built and loaded at their first test."""
    if reason := cuda_emulator.why_not():
        pytest.skip(reason)
