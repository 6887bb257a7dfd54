"""What all blocks are to those who call them, and to the tools that take modules apart."""

from collections.abc import Callable
from typing import Any, NoReturn

from torch import fx, nn

from foveal.blocks._plain import is_untouched
from foveal.ops.backend import infers_on_cpu

READINGS: dict[type, tuple[Callable, Callable]] = {}  # filled in inference.py: the forward of a class, and its reading


class MapModule(nn.Module):
    """A module over maps. Its forward is its equation; in inference on the CPU its reading may stand for that.

    It chooses by the sizes of maps, so torch.fx keeps it whole, and torch.jit.script refuses it.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tracer: Any = next((arg.tracer for arg in (*args, *kwargs.values()) if isinstance(arg, fx.Proxy)), None)
        if tracer is not None:
            return tracer.call_module(self, lambda *args, **kwargs: _whole(tracer, self, args, kwargs), args, kwargs)
        if args and not kwargs and infers_on_cpu(args[0]):
            branch = read(self, *args, apart=False)
            if branch is not None:
                return branch.total()
        return super().__call__(*args, **kwargs)

    def __prepare_scriptable__(self) -> NoReturn:
        raise NotImplementedError(
            f"torch.jit.script does not take {type(self).__name__}, which chooses by the sizes of its input: use "
            "torch.jit.trace for one size, torch.export.export for one or open sizes, or torch.compile"
        )


def _whole(tracer: Any, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> fx.Proxy:
    return tracer.create_proxy("call_module", tracer.path_of_module(module), args, kwargs)


def read(block: nn.Module, *inputs: Any, apart: bool) -> Any:
    """A block's result by its reading, a Branch; None where it has none, or it, or a child, has been altered.

    ``apart``: whether the branch may leave its last bias apart.
    """
    kind: Any = type(block)
    forward, reading = READINGS.get(kind, (None, None))
    return reading(block, *inputs, apart) if reading and forward is kind.forward and is_untouched(block) else None
