"""Running a network for analysis without a trace."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["unchanged"]


@contextmanager
def unchanged(module: nn.Module, training: bool) -> Iterator[None]:
    """Put a module into training or evaluation mode; afterwards every mode and buffer is as it was.

    Args:
        module: the module, whose parts may be in different modes.
        training: which mode.
    """
    modes = [(part, part.training) for part in module.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        module.train(training)
        yield
    finally:
        for part, mode in modes:
            part.training = mode
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
