"""Scales that are learned, and start from the first batch of training (LSQ)."""

from collections.abc import Callable

import torch
from torch import Tensor, distributed, nn

from .functional import straight_through

__all__ = ["FirstBatch", "LearnedScale"]

SMALLEST = 1e-5  # what a scale is used as where training has pushed it below


class FirstBatch(nn.Module):
    """Takes something from the first batch of training.

    That is the first forward pass in training mode, whether or not quantizers binarize yet; several processes take the
    mean of theirs. A batch that gives no number in one of them, as that of a mask head without objects, is not it.
    Checkpoints say whether it has happened.

    Args:
        started: whether there is nothing to take.
    """

    def __init__(self, started: bool = False):
        super().__init__()
        self.register_buffer("started", torch.tensor(started, dtype=torch.uint8))
        self._has_started = started  # spares the GPU a synchronisation in each forward pass

    @torch.no_grad()
    def take(self, first_values: Callable[[], Tensor]) -> Tensor | None:
        """Return the values, if this is the first forward pass of training."""
        if self._has_started or not self.training:
            return None
        if self.started:
            self._has_started = True
            return None
        first = first_values()
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(first)
            first /= distributed.get_world_size()
        if not first.isfinite().all():
            return None
        self.started.fill_(1)
        self._has_started = True
        return first


class LearnedScale(FirstBatch):
    """One or several factors, which take their first values from the first batch of training; before, they are 1.

    Args:
        count: how many.
        start: their first value, if it is known; batches have no part in it then.
    """

    def __init__(self, count: int, start: float | None = None):
        super().__init__(started=start is not None)
        self.value = nn.Parameter(torch.full((count,), 1.0 if start is None else float(start)))

    def start_from(self, first_values: Callable[[], Tensor]) -> None:
        """Take the first values ``(count,)``, if this is the first forward pass of training."""
        first = self.take(lambda: first_values().to(self.value))
        if first is not None:
            with torch.no_grad():
                self.value.copy_(first)

    def positive(self) -> Tensor:
        """Return the factors ``(count,)``, each at least ``1e-5``, with the gradient of the factors themselves."""
        return straight_through(self.value.detach().clamp(min=SMALLEST), self.value)

    def extra_repr(self) -> str:
        return str(len(self.value))
