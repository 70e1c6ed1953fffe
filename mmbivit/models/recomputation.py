"""Blocks that are computed again in the backward pass instead of keeping what it needs."""

from contextlib import nullcontext

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmbivit.binary import ObservedAsNow

__all__ = ["RecomputableBlock"]


class RecomputableBlock(nn.Module):
    """Base of blocks that trade time for memory; a subclass has its computation in ``_forward``.

    Args:
        with_cp: compute the block again in the backward pass of training.
    """

    def __init__(self, with_cp: bool):
        super().__init__()
        self.with_cp = with_cp

    def forward(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """Transform tokens that lie on a grid of ``hw_shape``: ``(B, N, C) -> (B, N, C)``."""
        if self.with_cp and self.training and x.requires_grad:
            contexts = (nullcontext(), _AsBefore(self))
            return checkpoint(self._forward, x, hw_shape, use_reentrant=False, context_fn=lambda: contexts)
        return self._forward(x, hw_shape)


class _AsBefore:
    """Lets a checkpointed block be computed again as it was: hooks that are gone by then count, and BatchNorm keeps its
    running statistics; may be entered anew.
    """

    def __init__(self, module: nn.Module):
        self._observed = ObservedAsNow(module)
        self._norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]

    def __enter__(self) -> None:
        self._observed.__enter__()
        self._kept = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in self._norms]  # type: ignore[union-attr]  # it tracks them
        for norm in self._norms:
            norm.momentum = 0.0

    def __exit__(self, *exc_info: object) -> None:
        self._observed.__exit__()
        for norm, (momentum, batches) in zip(self._norms, self._kept, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(batches)  # type: ignore[union-attr]  # see above
