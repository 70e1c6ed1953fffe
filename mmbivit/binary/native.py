"""Native kernels of training: what they offer. A package above this one brings them: ``mmbivit.packed.training``."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

__all__ = ["TrainingKernels", "native_kernels", "offer_kernels"]


@dataclass(frozen=True)
class TrainingKernels:
    """Forms of what this package computes in training that are faster, for float32 on the CPU.

    Args:
        run: whether they run on this machine.
        linear: ``follower(Sign(x - gamma) @ W.T + bias)`` of the input ``x`` ``(*, in_features)``, thresholds
            ``(in_features,)`` or ``None``, latent weights ``(out_features, in_features)``, the bias or ``None``, the
            rule (``ste`` and ``center`` of :func:`mmbivit.binary.binarize_weight` with a scale per row; ``None`` for
            float weights), the :class:`mmbivit.binary.kept.Follower` or ``None``, and its parameters.
        attention: what :func:`mmbivit.binary.kept_attention.kept_attention` computes.
    """

    run: Callable[[], bool]
    linear: Callable[..., Tensor]
    attention: Callable[..., Tensor]


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
