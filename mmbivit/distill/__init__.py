"""Distillation of a float teacher: what is compared (taps), losses, and how they enter a model's own losses."""

from .distiller import Distiller, DistillTerm
from .losses import (
    AttentionRankingLoss,
    BlockMSELoss,
    DetectorMSELoss,
    DirectionMatchingLoss,
    HardCrossEntropyLoss,
    SoftCrossEntropyLoss,
)

__all__ = [
    "AttentionRankingLoss",
    "BlockMSELoss",
    "DetectorMSELoss",
    "DirectionMatchingLoss",
    "DistillTerm",
    "Distiller",
    "HardCrossEntropyLoss",
    "SoftCrossEntropyLoss",
]
