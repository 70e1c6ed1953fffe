import pytest
import torch
from torch import nn

from mmbivit.analysis.observation import find_block, observed
from mmbivit.models import BinarySwinTransformer

ARCH = dict(embed_dims=8, depths=(2, 1), num_heads=(1, 2))


def test_observed_sees_every_call_and_leaves_nothing():
    layers = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    seen = []
    x = torch.randn(4, 2)
    with pytest.raises(KeyError), observed({"first": layers[0], "second": layers[1]}, lambda *call: seen.append(call)):
        y = layers(x)
        raise KeyError  # the hooks have to go all the same
    hidden = layers[0](x)
    assert [name for name, _, _ in seen] == ["first", "second"]
    assert seen[0][1][0] is x and torch.equal(seen[0][2], hidden)
    assert torch.equal(seen[1][1][0], hidden) and seen[1][2] is y
    assert not any(module._forward_hooks for module in layers.modules())


def test_find_block():
    network = BinarySwinTransformer(arch=ARCH, out_indices=(1,))
    assert find_block(network) == ("stages.0.blocks.1", network.stages[0].blocks[1])
    assert find_block(network, "stages.1.blocks.0") == ("stages.1.blocks.0", network.stages[1].blocks[0])


def test_unknown_block():
    network = BinarySwinTransformer(arch=ARCH, out_indices=(1,))
    message = (
        "there is no block 'stage.1.block.0'; allowed: the 3 from stages.0.blocks.0 to stages.1.blocks.0; "
        "did you mean 'stages.1.blocks.0'?"
    )
    with pytest.raises(ValueError) as error:
        find_block(network, "stage.1.block.0")
    assert str(error.value) == message
