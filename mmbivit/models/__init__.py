"""Backbones with 1-bit weights and activations, registered in scope ``mmbivit``."""

from .arch import ARCHITECTURES
from .attention import WindowAttention
from .checkpoint import load_checkpoint_file, load_pretrained
from .classifier import ImageClassifier
from .layout import WindowLayout
from .mlp import DualBranchMLP, SpatialInteraction
from .packed import PackedSwinTransformer
from .preprocessor import ClassificationPreprocessor
from .stage import StagedModule
from .swin import BinarySwinTransformer

__all__ = [
    "ARCHITECTURES",
    "BinarySwinTransformer",
    "ClassificationPreprocessor",
    "DualBranchMLP",
    "ImageClassifier",
    "PackedSwinTransformer",
    "SpatialInteraction",
    "StagedModule",
    "WindowAttention",
    "WindowLayout",
    "load_checkpoint_file",
    "load_pretrained",
]
