"""The golden numbers: how their weights and inputs are drawn (tests/golden/README.md)."""

import json
import zlib
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).parent / "golden"


class Golden:
    """One golden file: its configuration, its stored results, and the tensors that it was measured on."""

    def __init__(self, name: str):
        self.arrays = dict(np.load(FOLDER / f"{name}.npz"))
        self.meta = json.loads(bytes(self.arrays.pop("meta")))

    def __getitem__(self, key: str) -> torch.Tensor:
        return torch.from_numpy(self.arrays[key])

    def z(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        generator = np.random.default_rng([self.meta["seed"], zlib.crc32(name.encode())])
        return generator.standard_normal(shape).astype(np.float32)

    def draw(self, name: str, *shape: int) -> torch.Tensor:
        """An input or an upstream gradient."""
        return torch.from_numpy(self.z(name, shape))

    def weights(self) -> dict[str, torch.Tensor]:
        """The parameters, in the official key layout."""
        return {key: torch.from_numpy(self._parameter(key, tuple(shape))) for key, shape in self.meta["params"]}

    def gradients(self) -> dict[str, torch.Tensor]:
        return {key.removeprefix("grad."): self[key] for key in self.arrays if key.startswith("grad.")}

    def _parameter(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        z = self.z(name, shape).astype(np.float64)
        if name.endswith("temperature"):
            value = 4 + 0.3 * z
        elif name.endswith("weight"):
            value = 1 + 0.1 * z if len(shape) == 1 else z / np.sqrt(np.prod(shape[1:]))
        else:
            value = 0.1 * z
        return value.astype(np.float32)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, what: str, *, floor: float = 0.0, tol: float = 1e-4):
    """Within ``tol`` of the largest magnitude, or of ``floor`` where that is larger."""
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)} != {tuple(expected.shape)}"
    bound = tol * max(expected.abs().max().item(), floor)
    error = (actual - expected).abs().max().item()
    assert error <= bound, f"{what}: error {error:.2e} over {bound:.2e}"


def assert_gradients_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]):
    """Within 1e-3 of each gradient's largest magnitude, or of a thousandth of the largest gradient of all."""
    assert actual.keys() == expected.keys()
    floor = 1e-3 * max(g.abs().max().item() for g in expected.values())
    for name, gradient in expected.items():
        assert_close(actual[name], gradient, f"gradient of {name}", floor=floor, tol=1e-3)
