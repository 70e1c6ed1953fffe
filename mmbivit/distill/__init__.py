"""Distillation of a float teacher's block outputs."""

from .distiller import BlockDistiller
from .losses import BlockMSELoss
from .recorder import FeatureRecorder, backbone_blocks

__all__ = ["BlockDistiller", "BlockMSELoss", "FeatureRecorder", "backbone_blocks"]
