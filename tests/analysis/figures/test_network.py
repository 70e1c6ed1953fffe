"""The picture of a backbone: every product of a block is in it, with its bits."""

import pytest
from torch import nn

from mmbivit.analysis import complexity
from mmbivit.analysis.figures.network import block_parts, network_figure
from mmbivit.models import BinarySwinTransformer, BinaryVisionTransformer, find_block

from .drawing import assert_texts_readable

SWIN = dict(arch=dict(embed_dims=8, depths=(1, 2), num_heads=(1, 2)), out_indices=(1,))
VIT = dict(arch=dict(embed_dims=8, depths=(2,), num_heads=(2,)), patch_size=8, pretrain_img_size=32)


@pytest.mark.parametrize("recipe", ["sibivit", "reactnet", "float"])
@pytest.mark.parametrize(("cls", "options"), [(BinarySwinTransformer, SWIN), (BinaryVisionTransformer, VIT)])
def test_all_products_of_a_block_are_there(cls, options, recipe):
    si = None if recipe == "float" else dict(ratio=1.0)
    network = cls(recipe=recipe, spatial_interaction=si, **options)
    block = find_block(network)
    parts = list(block_parts(block.module))
    products = [part for part in parts if part.bits is not None]
    counted = [
        row for row in complexity(network, (3, 32, 32)).rows if row.name.startswith(f"{block.name}.") and row.bits
    ]
    assert len(products) == len(counted) + 1  # attention is one row there, of two products
    assert {part.bits for part in products} == ({(32, 32)} if recipe == "float" else {(1, 1)})
    assert [part.label for part in products if part.branch == "attn"][:2] == [
        "qkv: 8 to 24",
        f"q k, heads: {block.module.attn.num_heads}",
    ]


def test_stages_and_parts_are_drawn():
    figure = network_figure(BinarySwinTransformer(**SWIN, spatial_interaction=dict(ratio=1.0)), "a title")
    assert_texts_readable(figure)
    texts = [text.get_text() for ax in figure.axes for text in ax.texts]
    assert "stage 1: 2 blocks\n16 channels\n2 heads\ntokens of 8 x 8 pixels" in texts
    assert {"attn", "mlp", "mlp.si", "fc1: 49 to 49  (1 x 1 bit)"} <= set(texts)
    with pytest.raises(ValueError, match="Linear has no transformer blocks that are known"):
        network_figure(nn.Linear(2, 2), "")
