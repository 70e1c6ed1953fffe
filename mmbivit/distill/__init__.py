"""Distillation of a float teacher: what is compared (taps), losses, and how they enter a model's own losses."""

from .distiller import Distiller, DistillTerm
from .losses import BlockMSELoss, SoftCrossEntropyLoss

__all__ = ["BlockMSELoss", "DistillTerm", "Distiller", "SoftCrossEntropyLoss"]
