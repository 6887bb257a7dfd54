"""Which implementation of an op runs: decided per call, from the inputs and from what the user asked for."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from foveal.ops._checks import check_choice
from foveal.ops.compiled import library
from foveal.ops.tracing import is_exporting

BACKENDS = ("auto", "compiled", "reference")
COMPILED_DTYPES = {
    "cpu": (torch.float32, torch.bfloat16, torch.float64),
    "cuda": (torch.float32, torch.float16, torch.bfloat16),
}

_chosen: ContextVar[str | None] = ContextVar("foveal_backend", default=None)
_chosen_for_graphs: str | None = None  # the last choice of any thread; PyTorch 2.11 cannot trace a ContextVar


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Choose the implementation of foveal's ops within a ``with`` block, over the environment's FOVEAL_BACKEND.

    Args:
        name: "auto" (compiled where it serves the inputs, else reference), "compiled" (raises with every reason
            where it cannot run) or "reference" (plain PyTorch).

    Example:
        >>> with foveal.ops.backend("reference"):
        ...     y = model(x)
    """
    global _chosen_for_graphs
    check_choice("backend", name, BACKENDS)
    before, token = _chosen_for_graphs, None if torch.compiler.is_compiling() else _chosen.set(name)
    _chosen_for_graphs = name
    try:
        yield
    finally:
        _chosen_for_graphs = before
        if token is not None:
            _chosen.reset(token)


def _environment_backend() -> str:
    name = os.environ.get("FOVEAL_BACKEND", "auto")
    check_choice("the environment variable FOVEAL_BACKEND", name, BACKENDS)
    return name


_default = _environment_backend()


def current_backend() -> str:
    """The backend in force: "auto", "compiled" or "reference"."""
    return (_chosen_for_graphs if torch.compiler.is_compiling() else _chosen.get()) or _default


def runs_compiled(op: str, x: Tensor, unsupported: Sequence[str] = ()) -> bool:
    """Decide whether a call of ``op`` goes to its compiled kernels.

    Args:
        op: name of the op, for the error.
        x: an input that tells the device.
        unsupported: one line per property of the inputs that the kernels do not serve.

    Raises:
        RuntimeError: the backend is "compiled" and there is a reason against it; the message holds them all.
    """
    choice = current_backend()
    if choice == "reference":
        return False
    reasons = [*unsupported, *circumstances(x)]
    if not reasons or choice == "compiled":
        device = x.device.type if x.device.index is None else f"{x.device.type}:{x.device.index}"
        tracing = torch.compiler.is_compiling()
        why = library.why_not_while_tracing(device) if tracing else library.why_not(device)
        if why is not None:
            reasons.append(why)
    if reasons and choice == "compiled":
        raise RuntimeError(f"the backend is 'compiled', but {op} cannot run compiled:\n- " + "\n- ".join(reasons))
    return not reasons


def infers_on_cpu(x: Tensor) -> bool:
    """Whether grad mode is off, and nobody traces or transforms what is computed from ``x`` on the CPU."""
    if not isinstance(x, Tensor) or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return x.device.type == "cpu" and not circumstances(x)


def infers_compiled(op: str, x: Tensor, *others: Tensor | None, unsupported: Sequence[str] = ()) -> bool:
    """Whether a call that nobody differentiates runs compiled on the CPU, which has kernels for inference alone."""
    differentiated = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *others))
    return x.device.type == "cpu" and not differentiated and runs_compiled(op, x, [*unserved_dtype(x), *unsupported])


def unserved_dtype(x: Tensor) -> list[str]:
    """The reason against the dtype of the activations, if there is one."""
    served = COMPILED_DTYPES.get(x.device.type, ())
    if x.dtype in served or not served:
        return []
    return [f"{x.dtype} is not served on {x.device.type} ({', '.join(map(str, served))} are)"]


def circumstances(x: Tensor) -> list[str]:
    """Reasons that lie in how an op is called."""
    reasons = []
    if is_exporting():
        reasons.append("the graph is being exported or traced, and is to run without foveal")
    if torch._C._are_functorch_transforms_active():
        reasons.append("a torch.func transform is active")
    if not torch.compiler.is_compiling() and torch.autograd.forward_ad._current_level >= 0:
        reasons.append("derivatives are being computed forwards")
    if type(x) is not Tensor and type(x) is not torch.nn.Parameter and not torch.compiler.is_compiling():
        reasons.append(f"the input is a {type(x).__name__}, not a plain tensor")
    return reasons
