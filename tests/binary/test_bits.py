"""Signs as bits against NumPy's packing."""

import numpy as np
import pytest
import torch

from mmbivit.binary import num_bytes, pack_bits, unpack_bits


@pytest.mark.parametrize("size", [1, 7, 8, 9, 31, 32, 33, 63, 64, 65])
@pytest.mark.parametrize("shape", [(), (3,), (2, 0), (2, 3)])
def test_bits_are_little_endian_and_come_back(size, shape):
    torch.manual_seed(0)
    bits = torch.rand(*shape, size) > 0.5
    packed = pack_bits(bits)
    expected = np.packbits(bits.numpy(), axis=-1, bitorder="little")
    assert packed.dtype == torch.uint8 and packed.shape == (*shape, num_bytes(size))
    np.testing.assert_array_equal(packed.numpy(), expected)
    assert torch.equal(unpack_bits(packed, size), bits)


def test_strides_do_not_matter():
    torch.manual_seed(0)
    bits = (torch.rand(40, 16) > 0.5).T
    packed = pack_bits(bits)
    assert packed.is_contiguous() and torch.equal(packed, pack_bits(bits.contiguous()))
    assert torch.equal(unpack_bits(packed.T.contiguous().T, 40), bits)
