"""Packed networks: binary layers that run on bits, by native kernels or a torch reference. Needs torch alone."""

from .modules import PackedDualBranchMLP, PackedLinear, PackedPatchMerging, PackedWindowAttention
from .swin import PackedSwinTransformer

__all__ = [
    "PackedDualBranchMLP",
    "PackedLinear",
    "PackedPatchMerging",
    "PackedSwinTransformer",
    "PackedWindowAttention",
]
