"""Parameters and bytes of a network, as float and with its binary weights as bits."""

from dataclasses import dataclass

from torch import nn

from mmbivit.binary import BinaryLinear

__all__ = ["ModelSize", "model_size"]

FLOAT_BYTES = 4


@dataclass(frozen=True)
class ModelSize:
    """Size of a network.

    Args:
        params: learnable parameters.
        binary_weights: those of them that are 1-bit weights.
        float_bytes: bytes of all of them as float32.
        packed_bytes: bytes with 1 bit a binary weight, whole bytes a row, and one float32 scale per row; all other
            parameters as float32.
    """

    params: int
    binary_weights: int
    float_bytes: int
    packed_bytes: int


def model_size(module: nn.Module) -> ModelSize:
    """Count the parameters of a module and the bytes they take; buffers are left out.

    Weights count as binary by the layers' own bit widths, so a network in training stage 1 has none.

    Args:
        module: any module, float parts included.
    """
    params = sum(parameter.numel() for parameter in module.parameters())
    binary = packed = 0
    for layer in module.modules():
        if isinstance(layer, BinaryLinear) and layer.weight_bits == 1:
            binary += layer.weight.numel()
            packed += layer.out_features * (-(-layer.in_features // 8) + FLOAT_BYTES)
    return ModelSize(params, binary, FLOAT_BYTES * params, packed + FLOAT_BYTES * (params - binary))
