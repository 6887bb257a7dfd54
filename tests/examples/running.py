"""Running the examples as a user does, and looking at what they write."""

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

from PIL import Image

EXAMPLES = Path(__file__).parents[2] / "examples"
# One thread and no kernels to build: the examples are under test, and two runs of one must agree to the bit.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "FOVEAL_BACKEND": "reference", "HF_HUB_OFFLINE": "1"}


def start(name: str, *args, **kwargs) -> subprocess.Popen:
    def listen() -> None:  # Ctrl-C is ignored in what a shell runs in the background, these tests maybe
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    command = [sys.executable, str(EXAMPLES / name), *map(str, args)]
    return subprocess.Popen(command, env=ENVIRONMENT, text=True, preexec_fn=listen, **kwargs)


def run(name: str, *args, code: int = 0) -> tuple[str, str]:
    """What an example prints on stdout and stderr."""
    with start(name, *args, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        out, err = process.communicate(timeout=300)
    assert process.returncode == code, err
    return out, err


def load(name: str) -> ModuleType:
    """An example as a module, to call its functions. It finds what lies beside it, as when it is run."""
    if str(EXAMPLES) not in sys.path:
        sys.path.append(str(EXAMPLES))
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def colourful(path: Path) -> float:
    """The share of a picture's pixels that are neither black, white nor grey."""
    hues = Image.open(path).convert("HSV").split()[1].tobytes()
    return sum(saturation > 60 for saturation in hues) / len(hues)
