"""Signs as bits: eight a byte, in plain torch."""

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["BYTE_BITS", "num_bytes", "pack_bits", "unpack_bits"]

BYTE_BITS = 8


def num_bytes(bits: int) -> int:
    """Return how many bytes hold so many bits."""
    return -(-bits // BYTE_BITS)


def pack_bits(bits: Tensor) -> Tensor:
    """Pack booleans (True for +1) along the last axis.

    Little-endian: bit ``i % 8`` of byte ``i // 8`` is element ``i``; bits beyond the last element are 0.

    Args:
        bits: booleans ``(*, K)``.

    Returns:
        ``(*, ceil(K / 8))`` uint8.
    """
    octets = F.pad(bits.to(torch.uint8), (0, -bits.shape[-1] % BYTE_BITS))
    octets = octets.unflatten(-1, (octets.shape[-1] // BYTE_BITS, BYTE_BITS))
    packed = octets[..., 0].clone(memory_format=torch.contiguous_format)
    for i in range(1, BYTE_BITS):
        packed |= octets[..., i] << i
    return packed


def unpack_bits(packed: Tensor, size: int) -> Tensor:
    """Undo :func:`pack_bits`: ``(*, ceil(size / 8))`` uint8 -> booleans ``(*, size)``."""
    shifts = torch.arange(BYTE_BITS, dtype=torch.uint8, device=packed.device)
    bits = (packed.unsqueeze(-1) >> shifts) & 1
    return bits.flatten(-2)[..., :size].to(torch.bool)
