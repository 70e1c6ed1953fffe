import pytest
import torch

from mmbivit.analysis.balancing import balancing_factors
from mmbivit.models import BinarySwinTransformer

ARCH = dict(embed_dims=8, depths=(2, 1), num_heads=(1, 2))


def test_factors_of_each_block():
    network = BinarySwinTransformer(arch=ARCH, out_indices=(1,), spatial_interaction=dict(ratio=1.0))
    expected = {"stages.0.blocks.0": range(8), "stages.0.blocks.1": range(8, 16), "stages.1.blocks.0": range(16)}
    network.load_state_dict(
        network.state_dict() | {f"{name}.mlp.si.alpha": torch.tensor(values) / 4 for name, values in expected.items()}
    )
    factors = balancing_factors(network)
    assert list(factors) == list(expected)
    for name, values in expected.items():
        assert factors[name].tolist() == [value / 4 for value in values]
    factors["stages.0.blocks.0"][0] = 7
    assert network.stages[0].blocks[0].mlp.si.alpha[0] == 0  # the network's own are not shared


def test_network_without_spatial_interaction():
    with pytest.raises(ValueError, match="BinarySwinTransformer has no spatial interaction.*spatial_interaction=dict"):
        balancing_factors(BinarySwinTransformer(arch=ARCH, out_indices=(1,)))
