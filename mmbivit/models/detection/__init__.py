"""Necks and heads of MMDetection with 1-bit weights and activations, registered in scope ``mmbivit``."""

from .convolution import StagedConv2d
from .heads import BinaryConvFCBBoxHead, BinaryFCNMaskHead, BinaryRetinaHead, BinaryRPNHead
from .neck import BinaryFPN
from .part import BinaryPart

__all__ = [
    "BinaryConvFCBBoxHead",
    "BinaryFCNMaskHead",
    "BinaryFPN",
    "BinaryPart",
    "BinaryRPNHead",
    "BinaryRetinaHead",
    "StagedConv2d",
]
