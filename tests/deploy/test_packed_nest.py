"""Packed NesT against the simulated one: outputs within 1e-4, on every code path."""

import pytest
import torch

from mmbivit.deploy import PackedNesT, load, pack, save
from mmbivit.models import BinaryNesT
from tests.deploy.networks import randomise
from tests.deploy.test_packed_swin import assert_equal_outputs

TINY = dict(
    arch=dict(embed_dims=16, depths=(1, 2), num_heads=(1, 2)), pretrain_img_size=32, out_indices=(0, 1), mlp_ratio=3
)
SI = dict(spatial_interaction=dict(ratio=1.0))


def binary_nest(**options) -> BinaryNesT:
    torch.manual_seed(0)
    return randomise(BinaryNesT(**(TINY | options)))


@pytest.mark.parametrize(
    "options",
    [
        dict(**SI),
        dict(spatial_interaction=dict(ratio=2.0), mask_padding=False),
        dict(recipe="reactnet", **SI),
        dict(recipe="bivit", spatial_interaction=None, mlp_ratio=4),
        dict(recipe="bit", out_indices=(1,), **SI),
        dict(pretrain_img_size=96, in_channels=4, **SI),
    ],
    ids=lambda options: ", ".join(f"{key}={value}" for key, value in options.items()),
)
@pytest.mark.parametrize("size", [(32, 32), (45, 70)], ids=str)
def test_outputs_equal(options, size):
    assert_equal_outputs(binary_nest(**options), torch.randn(2, options.get("in_channels", 3), *size))


def test_it_goes_through_a_file(tmp_path):
    packed, images = pack(binary_nest(**SI)), torch.randn(1, 3, 40, 40)
    save(packed, tmp_path / "nest.safetensors")
    again = load(tmp_path / "nest.safetensors")
    assert type(again) is PackedNesT
    assert all(map(torch.equal, again(images), packed(images)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(embed_dims=0), "embed_dims=0"),
        (dict(depths=[2]), "one entry for each"),
        (dict(num_heads=[3, 2]), r"num_heads\[0\]=3 of 16 channels"),
        (dict(grid=7), "grid=7; expected a multiple of 2"),
        (dict(side=200), "side=200"),
        (dict(scales=[1.0, float("inf")]), "scales=inf"),
        (dict(si_hidden=-1), "si_hidden=-1"),
        (dict(out_indices=[1, 0]), "rising"),
        (dict(hidden_dims=["8", "8"]), "hidden_dims"),
    ],
)
def test_impossible_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        PackedNesT(**(pack(binary_nest(**SI)).options | change))
