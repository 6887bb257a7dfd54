"""What every test gets: fixed seeds, and a choice between the daily run and the full one."""

import os

import pytest
import torch

from foveal.ops.compiled import library


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked slow as well, as CI does")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: too long for every day; run with --slow")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # of pytest -n's workers, whose threads share the cores


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow"):
        return
    skip = pytest.mark.skip(reason="slow: run with --slow, as CI does")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def cpu_kernels():
    """The compiled CPU kernels, built and loaded at their first test."""
    if reason := library.why_not("cpu"):
        pytest.skip(reason)
