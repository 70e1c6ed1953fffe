"""Packed inference: networks whose binary layers run on bits, from a trained model to a small file and back."""

from mmbivit.packed import (
    PackedDualBranchMLP,
    PackedLinear,
    PackedNesT,
    PackedPatchMerging,
    PackedSwinTransformer,
    PackedVisionTransformer,
    PackedWindowAttention,
)

from .convert import pack
from .serialization import load, save

__all__ = [
    "PackedDualBranchMLP",
    "PackedLinear",
    "PackedPatchMerging",
    "PackedNesT",
    "PackedSwinTransformer",
    "PackedVisionTransformer",
    "PackedWindowAttention",
    "load",
    "pack",
    "save",
]
