"""The training example, as several files test it."""

import pytest

from tests.examples.running import run
from tests.examples.training_runs import SMALL, training_example


@pytest.fixture
def train():
    with training_example() as module:
        yield module


@pytest.fixture(scope="package")
def finished(tmp_path_factory):
    """A run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    out, err = run("train.py", *SMALL, "--output", folder)
    return folder, out, err
