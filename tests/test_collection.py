"""Collecting the tests builds nothing, and so, from an empty cache, loads nothing."""

import os
import subprocess
import sys
from pathlib import Path


def test_collecting_builds_nothing(tmp_path):
    command = [sys.executable, "-m", "pytest", "--collect-only", "--quiet", "-p", "no:xdist"]
    environment = {**os.environ, "FOVEAL_CACHE_DIR": str(tmp_path)}
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr
    assert list(tmp_path.iterdir()) == []
