"""What is measured at model level: foveal by backend, its linear layers alone, and the peers that are installed."""

import importlib.util
from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import foveal

TIMM_PEERS = ("pvt_v2_b2", "swin_tiny_patch4_window7_224", "convnext_tiny", "maxvit_tiny_tf_224")


class _OnBackend(nn.Module):
    def __init__(self, model: nn.Module, backend: str):
        super().__init__()
        self.model, self.backend = model, backend

    def forward(self, x: Tensor) -> Tensor:
        with foveal.ops.backend(self.backend):
            return self.model(x)


class _RecordLinear(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[torch.Size, torch.Size, bool]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.linear:
            x, weight, bias = (*args, *(kwargs or {}).values(), None)[:3]
            self.calls.append((x.shape, weight.shape, bias is not None))
        return func(*args, **(kwargs or {}))


class LinearFloor(nn.Module):
    """The linear layers of a model alone, on maps of the sizes that an input gives them: what no fusion can save.

    They run over the whole batch, as any network's do, and are recorded with gradients enabled: in inference some of
    foveal's blocks work through the batch in slices.
    """

    def __init__(self, model: nn.Module, x: Tensor):
        super().__init__()
        model = model.eval()
        with torch.no_grad():
            model(x)  # fills what is kept per size, such as position biases
            with torch.enable_grad(), _RecordLinear() as record:
                model(x)
        dd = {"device": x.device, "dtype": x.dtype}
        self.layers = nn.ModuleList(nn.Linear(w[1], w[0], bias=bias, **dd) for _, w, bias in record.calls)
        self.shapes = [(shape, (*shape[:-1], weight[0])) for shape, weight, _ in record.calls]
        self.maps = {shape: torch.randn(shape, **dd) for pair in self.shapes for shape in pair}

    def forward(self, x: Tensor) -> Tensor:
        training = torch.is_grad_enabled()
        for layer, (before, after) in zip(self.layers, self.shapes, strict=True):
            out = layer(self.maps[before].detach().requires_grad_(training))
            if training:
                out.backward(self.maps[after])
        return x.new_zeros((), requires_grad=training)


def build(name: str, x: Tensor) -> nn.Module:
    """A contender by name, on the device and in the dtype of its input; ``compiled foveal:...`` by torch.compile."""
    size, dd = tuple(x.shape[-2:]), {"device": x.device, "dtype": x.dtype}
    kind, _, variant = name.removeprefix("graphed ").partition(":")
    if kind.startswith("compiled "):
        return torch.compile(build(name.removeprefix("compiled "), x))
    if kind in ("foveal", "reference"):
        model = timm.create_model(variant, img_size=size, pretrain_size=224)
        return _OnBackend(model, "auto" if kind == "foveal" else "reference").to(**dd)
    if kind == "linear layers":
        return LinearFloor(build(f"foveal:{variant}", x), x)
    if kind == "birder":
        from birder.model_registry import registry

        return registry.net_factory(variant, num_classes=1000, size=size).to(**dd)
    if kind == "timm":
        return timm.create_model(variant).to(**dd)
    raise ValueError(f"unknown contender {name!r}")


def available(variant: str, *, peers: bool, device: str = "cpu") -> list[str]:
    """The names of the contenders that can be built here. On a GPU, compiled and as replayed CUDA graphs too."""
    names = [f"foveal:{variant}", f"reference:{variant}", f"linear layers:{variant}"]
    if device != "cpu":
        names += [f"{mode} foveal:{variant}" for mode in ("compiled", "graphed")] + [f"compiled reference:{variant}"]
    if peers and importlib.util.find_spec("birder"):
        names.append(f"birder:{variant}")
    names += [f"timm:{name}" for name in TIMM_PEERS if peers]
    return [*names, "compiled timm:convnext_tiny"] if peers and device != "cpu" else names


def graphed(step: Callable[[], object]) -> Callable[[], None]:
    """A step captured in a CUDA graph: replaying it launches all of its kernels at once."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def step(model: nn.Module, x: Tensor, training: bool) -> Callable[[], object]:
    """One inference, or one forward and backward pass, as a function without arguments."""
    if not training:
        model.eval()

        def infer() -> Tensor:
            with torch.inference_mode():
                return model(x)

        return infer
    model.train()

    def train() -> None:
        model.zero_grad(set_to_none=True)
        model(x).sum().backward()

    return train
