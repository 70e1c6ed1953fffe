import pytest
import torch
from torch import nn

from mmbivit.models.observation import observed


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
