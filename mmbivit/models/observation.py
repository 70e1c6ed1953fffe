"""Looking at modules while a network runs."""

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

__all__ = ["observed"]


@contextmanager
def observed(modules: Mapping[Any, nn.Module], see: Callable[[Any, tuple, Any], Any]) -> Iterator[None]:
    """Call ``see(name, arguments, output)`` whenever one of the modules has run; nothing is left on them afterwards.

    Args:
        modules: what to observe, by name.
        see: gets the module's name, its positional arguments and its output. What it returns, unless ``None``, takes
            the place of the output.
    """

    def hook(name: Hashable) -> Callable:
        return lambda module, args, output: see(name, args, output)

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
