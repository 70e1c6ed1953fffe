"""Packed inference: networks whose binary layers run on bits, from a trained model to a small file and back."""

from .convert import pack
from .modules import PackedDualBranchMLP, PackedLinear, PackedPatchMerging, PackedWindowAttention
from .serialization import load, save
from .swin import PackedSwinTransformer

__all__ = [
    "PackedDualBranchMLP",
    "PackedLinear",
    "PackedPatchMerging",
    "PackedSwinTransformer",
    "PackedWindowAttention",
    "load",
    "pack",
    "save",
]
