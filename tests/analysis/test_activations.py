import copy

import numpy as np
import pytest
import torch

from mmbivit.analysis.activations import activation_distributions
from mmbivit.models import BinarySwinTransformer
from tests.swin_weights import randomise

LAYERS = "attn.qkv attn.q attn.k attn.v attn.proj mlp.fc1 mlp.fc2 mlp.si.fc1 mlp.si.fc2".split()


def make_network(**options):
    torch.manual_seed(0)
    arch = dict(embed_dims=8, depths=(2, 1), num_heads=(1, 2))
    options = dict(window_size=4, out_indices=(1,), spatial_interaction=dict(ratio=1.0)) | options
    return randomise(BinarySwinTransformer(arch=arch, **options))


def inputs_by_hand(network, block, images):
    """Collect the inputs of all quantizers of a block, and their thresholds, by layer."""
    attn, mlp = block.attn, block.mlp
    linear = dict(
        zip(
            [name for name in LAYERS if name[-1] not in "qkv" or name == "attn.qkv"],
            (attn.qkv, attn.proj, mlp.fc1, mlp.fc2, mlp.si.fc1, mlp.si.fc2),
            strict=True,
        )
    )
    values = {name: [] for name in LAYERS}
    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: values[name].append(args[0]))
        for name, layer in linear.items()
    ]

    def of_qkv(_, __, output):
        for i, name in enumerate(("attn.q", "attn.k", "attn.v")):
            values[name].append(output[..., 8 * i : 8 * (i + 1)])

    handles.append(attn.qkv.register_forward_hook(of_qkv))
    with torch.no_grad():
        for image in images:
            network(image)
    for handle in handles:
        handle.remove()
    gammas = {name: layer.input_quantizer.gamma for name, layer in linear.items()}
    gammas |= {name: attn.qkv_quantizer.gamma[8 * i : 8 * (i + 1)] for i, name in enumerate(LAYERS[1:4])}
    return {name: (torch.cat(values[name]).numpy(), gammas[name].detach().numpy()) for name in LAYERS}


def test_equals_numpys_histogram_of_all_values():
    network = make_network()
    block = network.stages[0].blocks[1]
    # The second image has larger values than the first, so ranges have to grow with counts in them.
    images = [scale * torch.randn(1, 3, 30, 36) for scale in (0.1, 1, 0.5)]
    with torch.no_grad():
        block.norm1.weight.mul_(4)
    expected = inputs_by_hand(network, block, images)
    name, found = activation_distributions(network, iter(images))
    assert name == "stages.0.blocks.1"
    assert [distribution.layer for distribution in found] == LAYERS
    for distribution in found:
        values, gamma = expected[distribution.layer]
        assert np.array_equal(distribution.gamma, gamma)
        assert np.array_equal(distribution.counts, np.histogram(values, distribution.edges)[0])
        assert distribution.counts.sum() == values.size
        assert distribution.positive == np.mean(values >= gamma)
        assert distribution.inside == np.mean(np.abs(values - gamma) <= 1)
        assert len(distribution.counts) == 4096
    _, of_first = activation_distributions(network, images[:1])
    assert any(a.edges[-1] < b.edges[-1] for a, b in zip(of_first, found, strict=True))


def test_thresholds_of_channels_in_the_token_mixing():
    network = make_network(spatial_interaction=dict(ratio=1.0, per="channel"))
    _, found = activation_distributions(network, [torch.randn(1, 3, 32, 32)])
    assert [one.layer for one in found] == LAYERS
    assert {one.gamma.shape for one in found[-2:]} == {(8,)}


def test_values_at_the_ends_of_the_range():
    network = make_network()
    block = network.stages[0].blocks[1]
    with torch.no_grad():  # the input of fc1 is 2 in all tokens of half the channels, -2 in the others
        block.mlp.norm.weight.zero_()
        block.mlp.norm.bias.copy_(torch.tensor([2.0, -2.0]).repeat(4))
        block.mlp.fc1.input_quantizer.gamma.copy_(torch.tensor([2.0, -3.0]).repeat(4))
    _, found = activation_distributions(network, [torch.randn(1, 3, 32, 32)])
    distribution = found[LAYERS.index("mlp.fc1")]
    assert (distribution.edges[0], distribution.edges[-1]) == (-2, 2)
    assert (distribution.counts[0], distribution.counts[-1]) == (256, 256)  # 64 tokens of 4 channels
    assert (distribution.positive, distribution.inside) == (1, 1)  # x = gamma, and x - gamma = 1


def test_network_stays_as_it_was():
    network = make_network().train()
    network.stages[0].eval()
    before = copy.deepcopy(network.state_dict())
    modes = [module.training for module in network.modules()]
    activation_distributions(network, [torch.randn(1, 3, 32, 32)], "stages.1.blocks.0")
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert not any(module._forward_hooks for module in network.modules())


def test_errors():
    image = torch.randn(1, 3, 32, 32)
    with pytest.raises(ValueError, match="^nothing in block stages.0.blocks.1 is binarized with a threshold$"):
        activation_distributions(make_network(recipe="float", spatial_interaction=None), [image])
    with pytest.raises(ValueError, match="^no image was given"):
        activation_distributions(make_network(), [])
    with pytest.raises(ValueError, match="^attn.qkv gets values that are no numbers, or infinite"):
        activation_distributions(make_network(), [image * torch.inf])
    with pytest.raises(ValueError, match="^there is no block 'stages.2.blocks.0'"):
        activation_distributions(make_network(), [image], "stages.2.blocks.0")
