"""Operations of the papers' networks, with the counting that gives each printed number (docs/backbones.md)."""

import math

import pytest
import torch

from mmbivit.analysis import complexity
from mmbivit.models import BinaryNesT, BinaryVisionTransformer, BinaryViT


def count(arch: str, si: bool, recipe: str = "sibivit", **options):
    with torch.device("meta"):
        network = BinaryVisionTransformer(
            arch, recipe, spatial_interaction=dict(ratio=1.0) if si else None, mlp_ratio=3 if si else 4, **options
        )
    return complexity(network, (3, 224, 224))


@pytest.mark.parametrize(
    ("arch", "distilled", "bops"),
    [("tiny", False, 1.23), ("small", False, 4.20), ("tiny", True, 1.24)],
    ids=["ViT-T", "ViT-S", "DeiT-T"],
)
def test_sibivit_table_2_with_spatial_interaction(arch, distilled, bops):
    """197 tokens, and 198 of DeiT, which is the distilled one."""
    counted = count(arch, si=True, distillation_token=distilled)
    assert round(counted.bops / 1e9, 2) == bops


@pytest.mark.parametrize(
    ("arch", "distilled", "bops"),
    [("tiny", False, 1.40), ("small", False, 4.90), ("tiny", True, 1.41)],
    ids=["ViT-T", "ViT-S", "DeiT-T"],
)
def test_sibivit_table_2_without_spatial_interaction_counts_attention_twice(arch, distilled, bops):
    counted = count(arch, si=False, distillation_token=distilled)
    tokens, channels = 198 if distilled else 197, 192 if arch == "tiny" else 384
    attention = 12 * 2 * tokens**2 * channels  # both products, of the 12 blocks
    assert round((counted.bops + attention) / 1e9, 2) == bops


@pytest.mark.parametrize(
    ("arch", "flops", "bops", "digits"), [("small", 0.57, 4.51, 2), ("base", 1.15, 17.3, 1)], ids=["S", "B"]
)
def test_binaryvit_table_4_counts_baselines_without_class_token(arch, flops, bops, digits):
    """Its digits are cut, not rounded; for Baseline-B it prints 17.4, which is 17.355 rounded."""
    counted = count(arch, si=False, recipe="reactnet", class_token=False)
    assert math.floor(counted.flops / 1e6) / 100 == flops
    assert math.floor(counted.bops / 1e9 * 10**digits) / 10**digits == bops


def test_float_vits_have_the_operations_of_sibivit_tables_2_and_3():
    """Without the products of attention, and with 5 operations for each value of a LayerNorm."""
    for arch, channels, flops in (("tiny", 192, 1.08), ("small", 384, 4.25), ("base", 768, 16.86)):
        counted = count(arch, si=False, recipe="float")
        attention, norms = 12 * 2 * 197**2 * channels, 5 * 25 * 197 * channels
        assert (counted.flops - attention + norms) / 1e9 == pytest.approx(flops, abs=0.01)


def test_nest_t_has_the_operations_of_sibivit_tables_2_and_3():
    """Without spatial interaction attention counts twice, as for ViT; with it one of the two is left out.

    Both tables count 5 operations for each value of a LayerNorm of the float network, Table 3 attention as well.
    """
    attention = sum(2 * 196 * depth * tokens * channels for depth, tokens, channels in NEST_STAGES)
    square = sum(depth * tokens * channels**2 for depth, tokens, channels in NEST_STAGES)
    patches, convolutions = 3136 * 48 * 96, 9 * (3136 * 96 * 192 + 784 * 192 * 384)
    counted = {}
    for recipe, si in (("float", None), ("sibivit", None), ("sibivit", dict(ratio=1.0))):
        with torch.device("meta"):
            network = BinaryNesT(recipe=recipe, spatial_interaction=si, mlp_ratio=3 if si else 4, out_indices=(2,))
        counted[recipe, si is not None] = complexity(network, (3, 224, 224))
    alone, mixed, full = counted["sibivit", False], counted["sibivit", True], counted["float", False]
    # Token mixing has as many as attention, and aggregation is float.
    assert (alone.bops, mixed.bops) == (12 * square + attention, 10 * square + 2 * attention)
    assert alone.flops == mixed.flops == patches + convolutions
    assert full.flops == alone.flops + alone.bops
    assert round((alone.bops + attention) / 1e9, 2) == 5.34
    assert round((mixed.bops - attention) / 1e9, 2) == 4.06
    norms = sum(2 * depth * tokens * channels for depth, tokens, channels in NEST_STAGES)
    norms += 3136 * 192 + 784 * 384 + 196 * 384  # of aggregations, and the last one
    assert (full.flops - attention + 5 * norms) / 1e9 == pytest.approx(5.23, abs=0.01)
    assert (full.flops + 5 * norms) / 1e9 == pytest.approx(5.83, abs=0.01)


NEST_STAGES = ((2, 3136, 96), (2, 784, 192), (8, 196, 384))  # blocks, tokens, channels


@pytest.mark.parametrize(
    ("downsample", "flops", "bops", "ops"), [("binary", 0.19, 3.83, 0.79), ("float", 0.95, 3.75, 1.54)]
)
def test_binaryvit_has_the_operations_of_its_table_4(downsample, flops, bops, ops):
    """Each affine counts one operation a value: two in a block, and four of the pooling branches."""
    with torch.device("meta"):
        counted = complexity(BinaryViT(downsample=downsample, out_indices=(3,)), (3, 224, 224))
    values = 6 * sum(depth * tokens * channels for depth, tokens, channels in BINARYVIT_STAGES)
    found = (counted.flops + values) / 1e8, counted.bops / 1e9, (counted.ops + values) / 1e8
    # One unit of the last place: some of its digits are cut, others rounded.
    assert found == pytest.approx((flops, bops, ops), abs=0.01)


BINARYVIT_STAGES = ((3, 3136, 64), (4, 784, 128), (8, 196, 256), (4, 49, 512))
