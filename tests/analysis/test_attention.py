import copy
import math

import numpy as np
import pytest
import torch
from mmengine.registry import MODELS
from torch import nn

from mmbivit.analysis.attention import attention_map
from mmbivit.models import BinarySwinTransformer
from mmbivit.models.layout import norm_tokens
from tests.swin_weights import randomise

WINDOW, SHIFT = 4, 2


def make_network(recipe="sibivit", seed=0, **options):
    torch.manual_seed(seed)
    arch = dict(embed_dims=8, depths=(2, 2), num_heads=(2, 4))
    network = BinarySwinTransformer(arch=arch, recipe=recipe, window_size=WINDOW, out_indices=(0, 1), **options)
    return randomise(network)


def attention_by_hand(network, image, query, stage=0):
    """Compute what one token of the second, shifted block of a stage attends to, on the padded grid without windows."""
    with torch.no_grad():
        x, (height, width) = network.patch_embed(image)
        for i in range(stage + 1):
            if i:
                x, (height, width) = network.stages[i - 1].downsample(x, (height, width))
            for block in network.stages[i].blocks[: 1 if i == stage else 2]:
                x = block(x, (height, width))
        block = network.stages[stage].blocks[1]
        x = norm_tokens(block.norm1, x)[0].view(height, width, -1)
        padded = [math.ceil(size / WINDOW) * WINDOW for size in (height, width)]
        grid = torch.zeros(*padded, x.shape[-1])  # after the norm, as in the network
        grid[:height, :width] = x
        qkv = block.attn.qkv_quantizer(block.attn.qkv(grid))
        heads = block.attn.num_heads
        queries, keys, _ = qkv.view(*padded, 3, heads, -1).unbind(2)

        def window_of(i, size):
            # Which window holds a row or column; tokens that the shift takes round the border are apart.
            return (i - SHIFT) % size // WINDOW, i < SHIFT

        table = block.attn.relative_position_bias_table
        scores = {}
        for row in range(padded[0]):
            for column in range(padded[1]):
                together = all(
                    window_of(a, size) == window_of(b, size)
                    for a, b, size in zip(query, (row, column), padded, strict=True)
                )
                is_padding = row >= height or column >= width
                if together and not (is_padding and block.mask_padding):
                    dy, dx = query[0] - row, query[1] - column
                    bias = table[(dy + WINDOW - 1) * (2 * WINDOW - 1) + dx + WINDOW - 1]
                    products = (queries[query] * keys[row, column]).sum(-1) / math.sqrt(x.shape[-1] // heads)
                    scores[row, column] = products + bias
        weights = torch.stack(list(scores.values())).softmax(dim=0)
        if not isinstance(block.attn.attention, nn.Softmax):
            chosen = weights >= 0.25 * weights.amax(dim=0)
            weights = chosen / chosen.sum(dim=0)
    on_grid, on_padding = np.full((heads, height, width), np.nan), np.zeros(heads)
    for (row, column), weight in zip(scores, weights.numpy(), strict=True):
        if row < height and column < width:
            on_grid[:, row, column] = weight
        else:
            on_padding += weight
    return on_grid, on_padding


# Tokens of 4 pixels on a grid of 9 x 11, padded to 12 x 12: inside, at the border that the shift takes round, and in
# windows with padding; then the lower stage, 5 x 6 tokens of 8 pixels; then an image of less than one window.
CASES = [
    ((36, 44), 0, (18, 17), (4, 4)),
    ((36, 44), 0, (0, 0), (0, 0)),
    ((36, 44), 0, (43, 35), (8, 10)),
    ((35, 42), 0, (3, 31), (7, 0)),
    ((36, 44), 1, (40, 15), (1, 5)),
    ((12, 12), 0, (11, 4), (1, 2)),
]


@pytest.mark.parametrize("recipe", ["sibivit", "float"])
@pytest.mark.parametrize("size, stage, pixel, token", CASES)
def test_equals_attention_computed_by_hand(recipe, size, stage, pixel, token):
    network = make_network(recipe)
    image = torch.randn(1, 3, *size)
    seen = attention_map(network, image, f"stages.{stage}.blocks.1", pixel)
    weights, padding = attention_by_hand(network, image, token, stage)
    assert (seen.block, seen.query, seen.stride) == (f"stages.{stage}.blocks.1", token, 4 * 2**stage)
    assert seen.binary is (recipe == "sibivit")
    np.testing.assert_allclose(seen.weights, weights, atol=1e-6)  # NaN where NaN is expected, too
    np.testing.assert_allclose(seen.padding, padding, atol=1e-6)
    # All weight is on what the token can see: a masked key has none.
    np.testing.assert_allclose(np.nansum(seen.weights, axis=(1, 2)) + seen.padding, 1, atol=1e-5)
    assert seen.visible.tolist() == (~np.isnan(weights[0])).tolist()


def test_defaults_are_the_first_stages_last_block_and_the_middle():
    seen = attention_map(make_network(), torch.randn(1, 3, 32, 48))
    assert (seen.block, seen.query) == ("stages.0.blocks.1", (4, 6))


def test_unshifted_block_sees_its_window():
    seen = attention_map(make_network(), torch.randn(1, 3, 32, 32), "stages.0.blocks.0", (0, 16))
    expected = np.zeros((8, 8), dtype=bool)
    expected[4:, :4] = True
    assert seen.visible.tolist() == expected.tolist()


@pytest.mark.parametrize("block", ["stages.0.blocks.0", "stages.0.blocks.1", "stages.1.blocks.1"])
@pytest.mark.parametrize("pixel", [(0, 0), (43, 35)])
def test_mmdets_swin(block, pixel):
    ours = make_network("float")
    theirs = MODELS.build(
        dict(
            type="mmdet.SwinTransformer",
            embed_dims=8,
            depths=(2, 2),
            num_heads=(2, 4),
            window_size=WINDOW,
            strides=(4, 2),
            out_indices=(0, 1),
        )
    )
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict())
    image = torch.randn(1, 3, 36, 44)
    expected, seen = (attention_map(network, image, block, pixel) for network in (ours, theirs))
    np.testing.assert_allclose(seen.weights, expected.weights, atol=1e-5)
    np.testing.assert_allclose(seen.padding, expected.padding, atol=1e-5)
    assert (seen.query, seen.stride, seen.binary) == (expected.query, expected.stride, False)


def test_network_stays_as_it_was():
    network = make_network().train()
    network.stages[0].eval()
    before = copy.deepcopy(network.state_dict())
    modes = [module.training for module in network.modules()]
    attention_map(network, torch.randn(1, 3, 32, 32))
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert not any(module._forward_hooks for module in network.modules())


@pytest.mark.parametrize("pixel", [(48, 0), (0, 32), (-1, 5)])
def test_pixel_outside(pixel):
    message = f"pixel {pixel[0]} {pixel[1]} is not in the image.* 48 x 32 pixels .*; allowed: 0 to 47 and 0 to 31$"
    with pytest.raises(ValueError, match=message):
        attention_map(make_network(), torch.randn(1, 3, 32, 48), query=pixel)


def test_attention_of_another_kind():
    network = make_network()
    network.stages[0].blocks[1].attn = nn.Identity()
    with pytest.raises(ValueError, match="attention of SwinBlock cannot be looked at; allowed: blocks of mmbivit's"):
        attention_map(network, torch.randn(1, 3, 32, 32))
