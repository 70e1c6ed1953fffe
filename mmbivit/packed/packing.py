"""The bit layout of packed networks: signs to words and back.

A sign is one bit: 1 for +1, 0 for -1. Words have 32 bits (``torch.int32``, of which only the bit pattern matters).

Activations are rows. Bit ``c % 32`` of word ``c // 32`` is channel ``c``::

    word          0                      1                  ... ceil(C / 32) - 1
    bit     31 ... 2  1  0 |  31 ...  2   1   0 |
    channel 31 ... 2  1  0 |  63 ... 34  33  32 |              0 0 0  95 ...    (C = 96, or 0 bits beyond C)

Weights ``(N, K)`` lie in blocks of 16 output channels, ``(ceil(N / 16), ceil(K / 32), 16)``: one 512-bit vector holds
the same 32 inputs of 16 output channels, so that one XOR with a broadcast word of an activation row compares them all
and every output keeps its own lane::

    block 0:   word 0 of channels 0 1 2 ... 15 | word 1 of channels 0 1 2 ... 15 | ...
    block 1:   word 0 of channels 16 17 ... 31 | ...

Padding bits, of channels beyond K in the last word and of whole rows beyond N, are 0 on both sides. They never differ,
so they add nothing to a count of differing bits, and the product of signs is ``K - 2 * count`` with the true K
(SI-BiViT, Eq. 5: ``2 * popcount(XNOR) - K`` is the same number). Parameters per channel are padded to whole blocks too.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from mmbivit.binary import pack_bits, unpack_bits

__all__ = [
    "LANES",
    "WORD_BITS",
    "num_blocks",
    "num_words",
    "pack_signs",
    "pack_weight",
    "pad_channels",
    "padded",
    "unpack_signs",
    "unpack_weight",
    "word_blocks",
]

WORD_BITS = 32
LANES = 16


def num_words(bits: int) -> int:
    """Return how many words hold so many bits."""
    return -(-bits // WORD_BITS)


def num_blocks(channels: int) -> int:
    """Return how many blocks hold so many channels."""
    return -(-channels // LANES)


def padded(channels: int) -> int:
    """Round channels up to whole blocks."""
    return num_blocks(channels) * LANES


def pack_signs(signs: Tensor) -> Tensor:
    """Pack booleans (True for +1) along the last axis: ``(*, K) -> (*, ceil(K / 32))`` int32."""
    # A word is four bytes in the order of the machine, little-endian on all that the kernels are built for.
    return pack_bits(F.pad(signs, (0, -signs.shape[-1] % WORD_BITS))).view(torch.int32)


def unpack_signs(words: Tensor, size: int) -> Tensor:
    """Undo :func:`pack_signs`: ``(*, ceil(size / 32))`` int32 -> booleans ``(*, size)``."""
    # Unlike contiguous(), a clone has the last stride 1 also where that axis has one word.
    return unpack_bits(words.clone(memory_format=torch.contiguous_format).view(torch.uint8), size)


def pack_weight(signs: Tensor) -> Tensor:
    """Pack the signs of a weight matrix: booleans ``(N, K) -> (ceil(N / 16), ceil(K / 32), 16)`` int32."""
    return word_blocks(pack_signs(signs))


def word_blocks(words: Tensor) -> Tensor:
    """Lay rows of words out in blocks of 16 of them: ``(N, words) -> (ceil(N / 16), words, 16)``."""
    words = F.pad(words, (0, 0, 0, -len(words) % LANES))
    return words.view(len(words) // LANES, LANES, -1).transpose(1, 2).contiguous()


def unpack_weight(weight: Tensor, out_features: int, in_features: int) -> Tensor:
    """Undo :func:`pack_weight`: booleans ``(out_features, in_features)``."""
    return unpack_signs(weight.transpose(1, 2).flatten(0, 1)[:out_features], in_features)


def pad_channels(values: Tensor, value: float = 0) -> Tensor:
    """Pad the last axis to whole blocks of 16 channels with ``value``."""
    return F.pad(values, (0, -values.shape[-1] % LANES), value=value)
