"""What all blocks are to the tools that take modules apart."""

from typing import Any, NoReturn

from torch import fx, nn


class MapModule(nn.Module):
    """A module over maps, which chooses by their sizes: torch.fx keeps it whole, and torch.jit.script refuses it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tracer: Any = next((arg.tracer for arg in args if isinstance(arg, fx.Proxy)), None)
        if tracer is None:
            return super().__call__(*args, **kwargs)

        def as_a_whole(*args: Any, **kwargs: Any) -> fx.Proxy:
            return tracer.create_proxy("call_module", tracer.path_of_module(self), args, kwargs)

        return tracer.call_module(self, as_a_whole, args, kwargs)

    def __prepare_scriptable__(self) -> NoReturn:
        raise NotImplementedError(
            f"torch.jit.script does not take {type(self).__name__}, which chooses by the sizes of its input: use "
            "torch.jit.trace for one size, torch.export.export for one or open sizes, or torch.compile"
        )
