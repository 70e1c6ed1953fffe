"""Packed networks: binary layers that run on bits, by native kernels or a torch reference. Needs torch alone."""

from . import training  # noqa: F401  it offers its kernels to mmbivit.binary
from .convolution import PackedConv2d, PackedConvTranspose2d, PackedMapLinear, PackedScaledLinear
from .modules import PackedDualBranchMLP, PackedLinear, PackedPatchMerging, PackedWindowAttention
from .nest import PackedNesT, PackedNesTConfig
from .network import NETWORKS, PackedConfig, PackedNetwork, packed_network
from .residual import (
    PackedResidualAttention,
    PackedResidualLinear,
    PackedResidualMLP,
    PackedResidualPatchMerging,
)
from .swin import PackedSwinConfig, PackedSwinTransformer
from .vit import PackedVisionTransformer, PackedVisionTransformerConfig

__all__ = [
    "NETWORKS",
    "PackedConfig",
    "PackedConv2d",
    "PackedConvTranspose2d",
    "PackedDualBranchMLP",
    "PackedLinear",
    "PackedMapLinear",
    "PackedNesT",
    "PackedNesTConfig",
    "PackedNetwork",
    "PackedPatchMerging",
    "PackedResidualAttention",
    "PackedResidualLinear",
    "PackedResidualMLP",
    "PackedResidualPatchMerging",
    "PackedScaledLinear",
    "PackedSwinConfig",
    "PackedSwinTransformer",
    "PackedVisionTransformer",
    "PackedVisionTransformerConfig",
    "PackedWindowAttention",
    "packed_network",
]
