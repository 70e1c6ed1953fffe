"""Parameters and bytes of a network, as float and with its binary weights as bits."""

from dataclasses import dataclass

from torch import nn

__all__ = ["ModelSize", "layer_sizes", "model_size"]

FLOAT_BYTES = 4


@dataclass(frozen=True)
class ModelSize:
    """Size of a network.

    Args:
        params: learnable parameters.
        binary_weights: those of them that are 1-bit weights.
        float_bytes: bytes of all of them, and of the buffers that inference needs, as float32.
        packed_bytes: the same with 1 bit a binary weight, each layer's in whole bytes, and as float32 the scales that
            its quantizer computes: by SI-BiViT, Eq. 4, one (theta) per output of a binary layer.
    """

    params: int
    binary_weights: int
    float_bytes: int
    packed_bytes: int


def layer_sizes(module: nn.Module) -> dict[str, ModelSize]:
    """Return for each module inside, by its name, the size of what it holds itself; what is shared counts once.

    A weight is binary where its layer says ``weight_bits == 1`` now, so a network in training stage 1 has none. Buffers
    that inference needs are those with floating-point values in the state dict, such as running statistics, but
    neither counters of batches nor tables of indices, which can be made again.

    Args:
        module: any module, float parts included.
    """
    saved = module.state_dict().keys()
    seen: set[int] = set()
    sizes = {}
    for name, layer in module.named_modules():
        own = {key: parameter for key, parameter in layer.named_parameters(recurse=False) if id(parameter) not in seen}
        seen.update(map(id, own.values()))
        params = sum(parameter.numel() for parameter in own.values())
        buffers = sum(
            buffer.numel()
            for key, buffer in layer.named_buffers(recurse=False)
            if buffer.is_floating_point() and f"{name}.{key}".removeprefix(".") in saved
        )
        binary = packed = 0
        if getattr(layer, "weight_bits", 32) == 1 and "weight" in own:
            binary = layer.weight.numel()
            packed = -(-binary // 8) + FLOAT_BYTES * layer.weight_quantizer.extra_numbers(layer.weight_rows())
        floats = params + buffers
        sizes[name] = ModelSize(params, binary, FLOAT_BYTES * floats, packed + FLOAT_BYTES * (floats - binary))
    return sizes


def model_size(module: nn.Module) -> ModelSize:
    """Add up :func:`layer_sizes`: the parameters of a module and the bytes that it takes.

    Args:
        module: any module, float parts included.
    """
    sizes = layer_sizes(module).values()
    return ModelSize(*(sum(getattr(size, name) for size in sizes) for name in ModelSize.__dataclass_fields__))
