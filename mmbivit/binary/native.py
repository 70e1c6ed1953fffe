"""Native kernels of training: what they offer. A package above this one brings them: ``mmbivit.packed.training``."""

from typing import Protocol

import torch
from torch import Tensor

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
        rprelu: tuple[Tensor, Tensor, Tensor] | None = None,
        alpha: Tensor | None = None,
    ) -> Tensor:
        """Return ``RPReLU(Sign(x - gamma) @ W.T + bias)``, or ``alpha[:, None]`` times the product of ``(B, C, n)``.

        Args:
            x: ``(*, in_features)``.
            gamma: thresholds ``(in_features,)``; ``None`` for 0.
            weight: latent weights ``(out_features, in_features)``.
            bias: ``(out_features,)``, or ``None``.
            rule: ``ste`` and ``center`` of :func:`mmbivit.binary.binarize_weight` with a scale per row; ``None`` for
                float weights.
            rprelu: gamma, slope and zeta, ``(out_features,)`` each.
            alpha: ``(C,)``.
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


def native_kernels(x: Tensor) -> TrainingKernels | None:
    """Return the kernels that take an input, if there are any; none for ``torch.compile``, nor in autocast."""
    if torch.compiler.is_compiling() or x.device.type != "cpu" or x.dtype != torch.float32:
        return None
    if not _offered or torch.is_autocast_enabled("cpu") or not _offered[0].run():
        return None
    return _offered[0]
