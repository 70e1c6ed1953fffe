"""One packer for each class of trained networks, known to :func:`mmbivit.deploy.pack` once this is imported."""

from .convolution import pack_conv, pack_conv_transpose
from .linear import pack_linear
from .nest import pack_nest
from .residual import pack_residual_linear
from .swin import pack_swin
from .vit import pack_vit

__all__ = [
    "pack_conv",
    "pack_conv_transpose",
    "pack_linear",
    "pack_nest",
    "pack_residual_linear",
    "pack_swin",
    "pack_vit",
]
