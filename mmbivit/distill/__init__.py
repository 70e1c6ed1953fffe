"""Distillation of a float teacher's block outputs."""

from .distiller import BlockDistiller
from .losses import BlockMSELoss

__all__ = ["BlockDistiller", "BlockMSELoss"]
