"""Window partition and masks against explicit loops."""

import pytest
import torch
from torch import nn

from mmbivit.models.layout import WindowLayout, norm_tokens

SHAPES = [
    ((4, 4), 2, 0),
    ((4, 4), 2, 1),
    ((7, 7), 7, 3),
    ((5, 8), 4, 2),
    ((1, 9), 4, 0),
    ((9, 3), 3, 1),
    ((8, 13), 7, 3),
]


def window_positions(layout):
    """For each window and slot the (row, column) of the token that belongs there, by plain arithmetic."""
    height, width = layout.padded
    size, windows = layout.window_size, []
    for top in range(0, height, size):
        for left in range(0, width, size):
            windows.append(
                [
                    ((top + y + layout.shift) % height, (left + x + layout.shift) % width)
                    for y in range(size)
                    for x in range(size)
                ]
            )
    return windows


@pytest.mark.parametrize(("hw_shape", "size", "shift"), SHAPES)
def test_split_places_every_token_and_merge_undoes_it(hw_shape, size, shift):
    torch.manual_seed(0)
    layout = WindowLayout(hw_shape, size, shift)
    height, width = hw_shape
    x = torch.randn(2, height * width, 3)
    windows = layout.split(x)
    positions = window_positions(layout)
    assert windows.shape == (2 * len(positions), size * size, 3)
    for image in range(2):
        for index, slots in enumerate(positions):
            for slot, (row, column) in enumerate(slots):
                real = row < height and column < width
                expected = x[image, row * width + column] if real else torch.zeros(3)
                assert torch.equal(windows[image * len(positions) + index, slot], expected)
    assert torch.equal(layout.merge(windows), x)


@pytest.mark.parametrize(("hw_shape", "size", "shift"), SHAPES)
@pytest.mark.parametrize("mask_padding", [True, False])
def test_attention_mask_separates_wrapped_and_padded_tokens(hw_shape, size, shift, mask_padding):
    layout = WindowLayout(hw_shape, size, shift)
    height, width = layout.padded
    positions = window_positions(layout)
    mask = layout.attention_mask(mask_padding)
    mask = torch.zeros(len(positions), size**2, size**2, dtype=torch.bool) if mask is None else mask
    for index, slots in enumerate(positions):
        for query, (query_row, query_column) in enumerate(slots):
            for key, (key_row, key_column) in enumerate(slots):
                # Neighbours in the map stay within a window's size; tokens wrapped around from the far side do not.
                wrapped = shift and (
                    (query_row < shift) != (key_row < shift)
                    and slots[0][0] >= height - size
                    or (query_column < shift) != (key_column < shift)
                    and slots[0][1] >= width - size
                )
                padded = [row >= hw_shape[0] or column >= hw_shape[1] for row, column in (slots[query], slots[key])]
                expected = bool(wrapped)
                if mask_padding and any(padded):
                    expected = not all(padded)
                assert mask[index, query, key] == expected, (index, slots[query], slots[key])
    assert not mask.all(-1).any(), "every query may attend to something"


def test_attention_mask_is_none_where_nothing_is_masked():
    assert WindowLayout((8, 8), 4).attention_mask(True) is None
    assert WindowLayout((7, 8), 4).attention_mask(False) is None


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(3), nn.LayerNorm(3)])
def test_norm_tokens_normalises_channels(norm):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 3) * 3 + 1
    axes = (0, 1) if isinstance(norm, nn.BatchNorm1d) else (2,)
    expected = (x - x.mean(axes, keepdim=True)) / (x.var(axes, keepdim=True, unbiased=False) + 1e-5).sqrt()
    assert torch.allclose(norm_tokens(norm, x), expected, atol=1e-6)
