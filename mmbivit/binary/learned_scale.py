"""Scales that are learned, and start from the first batch of training (LSQ)."""

from collections.abc import Callable

import torch
from torch import Tensor, distributed, nn

from .functional import straight_through

__all__ = ["LearnedScale"]

SMALLEST = 1e-5  # what a scale is used as where training has pushed it below


class LearnedScale(nn.Module):
    """One or several factors, which take their first values from the first batch of training.

    That happens in the first forward pass in training mode, whether or not the quantizer binarizes yet; several
    processes take the mean of theirs. Checkpoints say whether it has happened. Before, the factors are 1.

    Args:
        count: how many.
        start: their first value, if it is known; batches have no part in it then.
    """

    def __init__(self, count: int, start: float | None = None):
        super().__init__()
        self.value = nn.Parameter(torch.full((count,), 1.0 if start is None else float(start)))
        self.register_buffer("started", torch.tensor(start is not None, dtype=torch.uint8))
        self._has_started = start is not None  # spares the GPU a synchronisation in each forward pass

    def start_from(self, first_values: Callable[[], Tensor]) -> None:
        """Take the first values ``(count,)``, if this is the first forward pass of training."""
        if self._has_started or not self.training:
            return
        if not self.started:
            with torch.no_grad():
                first = first_values().to(self.value)
                if distributed.is_available() and distributed.is_initialized():
                    distributed.all_reduce(first)
                    first /= distributed.get_world_size()
                self.value.copy_(first)
                self.started.fill_(1)
        self._has_started = True

    def positive(self) -> Tensor:
        """Return the factors ``(count,)``, each at least ``1e-5``, with the gradient of the factors themselves."""
        return straight_through(self.value.detach().clamp(min=SMALLEST), self.value)

    def extra_repr(self) -> str:
        return str(len(self.value))
