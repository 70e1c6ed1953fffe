"""Binarization with torch alone: formulas, quantizers, layers and recipes."""

from .attention import ElasticAttention, KeySelection, ScoreSign, SoftmaxThreshold, relative_position_index
from .bits import num_bytes, pack_bits, unpack_bits
from .convolution import BinaryConv2d, BinaryConvTranspose2d
from .functional import (
    binarize_weight,
    elastic_binary,
    rprelu,
    scaled_sign,
    score_sign,
    sign,
    sign_ste,
    straight_through,
    threshold_mask,
)
from .layers import (
    BinaryLayer,
    BinaryLinear,
    HeadNorm,
    HeadShortcut,
    ResidualBinaryLinear,
    RPReLU,
    product_and_act,
    repeat_or_average,
    scaled_product,
)
from .learned_scale import LearnedScale
from .quantizers import (
    ActivationQuantizer,
    ElasticBinary,
    LearnedScaleWeightSign,
    Quantizer,
    RSign,
    ScaledSign,
    WeightQuantizer,
    WeightSign,
)
from .recipe import RECIPES, Recipe, get_recipe

__all__ = [
    "ActivationQuantizer",
    "BinaryConv2d",
    "BinaryConvTranspose2d",
    "BinaryLayer",
    "BinaryLinear",
    "ElasticAttention",
    "ElasticBinary",
    "HeadNorm",
    "HeadShortcut",
    "KeySelection",
    "LearnedScale",
    "LearnedScaleWeightSign",
    "Quantizer",
    "RECIPES",
    "RPReLU",
    "RSign",
    "Recipe",
    "ResidualBinaryLinear",
    "ScaledSign",
    "ScoreSign",
    "SoftmaxThreshold",
    "WeightQuantizer",
    "WeightSign",
    "binarize_weight",
    "elastic_binary",
    "get_recipe",
    "num_bytes",
    "pack_bits",
    "product_and_act",
    "relative_position_index",
    "repeat_or_average",
    "rprelu",
    "scaled_product",
    "scaled_sign",
    "score_sign",
    "sign",
    "sign_ste",
    "straight_through",
    "threshold_mask",
    "unpack_bits",
]
