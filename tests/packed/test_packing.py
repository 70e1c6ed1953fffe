"""The bit layout: where each sign lies, and that padding is 0."""

import pytest
import torch

from mmbivit.packed.packing import pack_signs, pack_weight, pad_channels, unpack_signs, unpack_weight

WIDTHS = (1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 96, 127, 128, 129)


@pytest.mark.parametrize("width", WIDTHS)
def test_signs_come_back_at_any_width(width):
    signs = torch.rand(3, 2, width) < 0.5
    words = pack_signs(signs)
    assert words.shape == (3, 2, -(-width // 32)) and words.dtype == torch.int32
    assert torch.equal(unpack_signs(words, width), signs)


@pytest.mark.parametrize("width", WIDTHS)
def test_each_bit_has_its_place_and_padding_is_0(width):
    for channel in {0, width // 2, width - 1}:
        signs = torch.zeros(width, dtype=torch.bool)
        signs[channel] = True
        expected = [0] * (-(-width // 32))
        expected[channel // 32] = 1 << channel % 32
        assert [word % 2**32 for word in pack_signs(signs).tolist()] == expected
    padding = unpack_signs(pack_signs(torch.ones(width, dtype=torch.bool)), -(-width // 32) * 32)[width:]
    assert not padding.any()


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (15, 31), (16, 32), (17, 33), (48, 96), (33, 129)])
def test_weights_lie_in_blocks_of_16_rows(rows, width):
    signs = torch.rand(rows, width) < 0.5
    weight = pack_weight(signs)
    assert weight.shape == (-(-rows // 16), -(-width // 32), 16) and weight.is_contiguous()
    assert torch.equal(unpack_weight(weight, rows, width), signs)
    row, channel = rows - 1, width - 1
    word = int(weight[row // 16, channel // 32, row % 16]) >> channel % 32 & 1
    assert word == int(signs[row, channel])
    assert not unpack_weight(weight, weight.shape[0] * 16, width)[rows:].any()


def test_nothing_to_pack():
    assert pack_signs(torch.zeros(0, 40, dtype=torch.bool)).shape == (0, 2)
    assert unpack_signs(torch.zeros(0, 2, dtype=torch.int32), 40).shape == (0, 40)


def test_channels_are_padded_to_blocks():
    assert pad_channels(torch.ones(2, 17), -1.0).tolist() == [[1.0] * 17 + [-1.0] * 15] * 2
    assert pad_channels(torch.ones(16)).tolist() == [1.0] * 16
