"""Looking into a network while it runs."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from mmbivit.checks import did_you_mean
from mmbivit.distill import backbone_blocks

__all__ = ["find_block", "observed"]


@contextmanager
def observed(modules: Mapping[str, nn.Module], see: Callable[[str, tuple, Tensor], None]) -> Iterator[None]:
    """Call ``see(name, arguments, output)`` whenever one of the modules has run; nothing is left on them afterwards.

    Args:
        modules: what to observe, by name.
        see: gets the module's name, its positional arguments and its output.
    """

    def hook(name: str) -> Callable:
        return lambda module, args, output: see(name, args, output)

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def find_block(network: nn.Module, name: str | None = None) -> tuple[str, nn.Module]:
    """Return a transformer block of a backbone and its name.

    Args:
        network: a Swin backbone, ours or mmdet's.
        name: such as ``stages.0.blocks.1``; by default the last block of the first stage.

    Raises:
        ValueError: if there is no such block.
    """
    blocks = backbone_blocks(network)
    if name is None:
        first_stage = next(iter(blocks)).partition(".blocks.")[0] + "."
        name = [block for block in blocks if block.startswith(first_stage)][-1]
    if name not in blocks:
        names = list(blocks)
        raise ValueError(
            f"there is no block {name!r}; allowed: the {len(names)} from {names[0]} to {names[-1]}"
            f"{did_you_mean(name, names)}"
        )
    return name, blocks[name]
