"""Signs as bits: eight a byte, in plain torch."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["BYTE_BITS", "num_bytes", "pack_all", "pack_bits", "unpack_all", "unpack_bits"]

BYTE_BITS = 8
# Eight booleans are the bytes of one int64. The product moves bit 0 of byte i to bit 56 + i, and no two terms meet.
_GATHER = sum(1 << (56 - 7 * i) for i in range(BYTE_BITS))
_SPREAD = sum(1 << (8 * i) for i in range(BYTE_BITS))  # copies a byte into all eight
_EACH = sum(1 << (9 * i) for i in range(BYTE_BITS)) - (1 << 64)  # bit i of byte i, as a signed number


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


def pack_all(bits: Tensor) -> Tensor:
    """Pack booleans of any shape into ``(ceil(numel / 8),)`` uint8: bit ``i % 8`` of byte ``i // 8`` is element ``i``.

    Unlike :func:`pack_bits` it does not begin a byte for each row, and takes few passes over the booleans.
    """
    flat = bits.reshape(-1)
    if beyond := -flat.shape[0] % BYTE_BITS:
        flat = F.pad(flat, (0, beyond))
    return ((flat.view(torch.int64) * _GATHER) >> 56).to(torch.uint8)


def unpack_all(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """Undo :func:`pack_all`: booleans of this shape."""
    bits = ((packed.to(torch.int64) * _SPREAD) & _EACH).view(torch.uint8) != 0
    size = math.prod(shape)
    return bits.view(shape) if bits.shape[0] == size else bits[:size].view(shape)
