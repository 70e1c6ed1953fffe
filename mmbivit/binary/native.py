"""Native kernels of training: what they offer. A package above this one brings them: ``mmbivit.packed.training``."""

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from .kept import Follower

__all__ = ["TrainingKernels", "native_kernels", "offer_kernels"]


class TrainingKernels(Protocol):
    """Forms of what this package computes in training that are faster, for float32 on the CPU."""

    def run(self) -> bool:
        """Whether they run on this machine."""

    def linear(
        self,
        x: Tensor,
        gamma: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        rule: tuple[str, str] | None,
        follower: Follower | None = None,
        parameters: tuple[Tensor, ...] = (),
    ) -> Tensor:
        """Return ``follower(Sign(x - gamma) @ W.T + bias)``.

        Args:
            x: ``(*, in_features)``.
            gamma: thresholds ``(in_features,)``; ``None`` for 0.
            weight: latent weights ``(out_features, in_features)``.
            bias: ``(out_features,)``, or ``None``.
            rule: ``ste`` and ``center`` of :func:`mmbivit.binary.binarize_weight` with a scale per row; ``None`` for
                float weights.
            follower: what is computed from the product right behind it.
            parameters: its parameters.
        """

    def attention(
        self,
        qkv: Tensor,
        gamma: Tensor | None,
        bias: Tensor | None,
        mask: Tensor | None,
        scale: float,
        ratio: float,
        divide: bool,
        num_heads: int,
    ) -> Tensor:
        """Attend as :func:`mmbivit.binary.kept_attention.kept_attention` does."""


_offered: list[TrainingKernels] = []


def offer_kernels(kernels: TrainingKernels) -> None:
    """Let training use kernels from now on, where they run."""
    _offered[:] = [kernels]


def native_kernels(*operands: Tensor | None) -> TrainingKernels | None:
    """Return the kernels, if there are any that take such operands: plain float32 in the memory of the CPU.

    There are none for ``torch.compile``, nor in autocast.
    """
    if not _offered or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu") or not _offered[0].run():
        return None
    return _offered[0] if all(map(_is_plain, operands)) else None


def _is_plain(x: Tensor | None) -> bool:
    return x is None or (type(x) in (Tensor, Parameter) and x.device.type == "cpu" and x.dtype == torch.float32)
