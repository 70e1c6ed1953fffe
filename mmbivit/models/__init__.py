"""Backbones with 1-bit weights and activations, registered in scope ``mmbivit``."""

from mmbivit.checkpoints import load_checkpoint_file, load_pretrained, trust_checkpoints
from mmbivit.packed import NETWORKS, PackedSwinTransformer
from mmbivit.registry import MODELS

from .arch import ARCHITECTURES
from .attention import Attention, MultiHeadAttention, WindowAttention, find_attention
from .backbone import Backbone, Block, find_block, find_blocks
from .binaryvit import BinaryViT
from .block import TransformerBlock
from .classifier import ImageClassifier
from .feature_pyramid import SimpleFeaturePyramid
from .layout import AllTokens, TokenLayout, WindowLayout
from .mlp import DualBranchMLP, SpatialInteraction
from .nest import BinaryNesT
from .observation import observed
from .preprocessor import ClassificationPreprocessor
from .stage import StagedModule, TrainingStage
from .swin import BinarySwinTransformer
from .vit import BinaryVisionTransformer

__all__ = [
    "ARCHITECTURES",
    "AllTokens",
    "Attention",
    "Backbone",
    "BinaryNesT",
    "BinarySwinTransformer",
    "BinaryViT",
    "BinaryVisionTransformer",
    "Block",
    "ClassificationPreprocessor",
    "DualBranchMLP",
    "ImageClassifier",
    "MultiHeadAttention",
    "PackedSwinTransformer",
    "SimpleFeaturePyramid",
    "SpatialInteraction",
    "StagedModule",
    "TokenLayout",
    "TrainingStage",
    "TransformerBlock",
    "WindowAttention",
    "WindowLayout",
    "find_attention",
    "find_block",
    "find_blocks",
    "load_checkpoint_file",
    "load_pretrained",
    "observed",
    "trust_checkpoints",
]

# The package of packed networks needs torch alone, and so knows no registry of MMEngine.
for _network in NETWORKS.values():
    MODELS.register_module(module=_network)
