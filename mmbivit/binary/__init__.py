"""Binarization with torch alone: formulas, quantizers, layers and recipes."""

from .attention import SoftmaxThreshold, relative_position_index
from .bits import num_bytes, pack_bits, unpack_bits
from .functional import binarize_weight, rprelu, sign, sign_ste, straight_through, threshold_mask
from .layers import BinaryLinear, RPReLU
from .quantizers import ActivationQuantizer, Quantizer, RSign, WeightQuantizer, WeightSign
from .recipe import RECIPES, Recipe, get_recipe

__all__ = [
    "RECIPES",
    "ActivationQuantizer",
    "BinaryLinear",
    "Quantizer",
    "RPReLU",
    "RSign",
    "Recipe",
    "SoftmaxThreshold",
    "WeightQuantizer",
    "WeightSign",
    "binarize_weight",
    "get_recipe",
    "num_bytes",
    "pack_bits",
    "relative_position_index",
    "rprelu",
    "sign",
    "sign_ste",
    "straight_through",
    "threshold_mask",
    "unpack_bits",
]
