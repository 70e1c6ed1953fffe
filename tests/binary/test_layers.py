"""Binary layers against explicit bit arithmetic and hand-written references."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from mmbivit.binary import BinaryLinear, RPReLU, RSign, SoftmaxThreshold


def test_binary_linear_equals_xnor_popcount():
    torch.manual_seed(0)
    layer = BinaryLinear(33, 5).double()
    nn.init.normal_(layer.input_quantizer.gamma)
    x = torch.randn(2, 7, 33, dtype=torch.float64)
    x[0, 0] = layer.input_quantizer.gamma.detach()
    activation_bits = (x - layer.input_quantizer.gamma).detach().numpy() >= 0
    weight = layer.weight.detach().numpy()
    weight_bits = weight - weight.mean(1, keepdims=True) >= 0
    theta = np.abs(weight).mean(1)
    popcount = (activation_bits[..., None, :] == weight_bits).sum(-1)
    expected = theta * (2 * popcount - 33) + layer.bias.detach().numpy()
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=1e-12)


def test_binary_linear_sides_can_be_float():
    torch.manual_seed(0)
    layer = BinaryLinear(8, 3, bias=False)
    x = torch.randn(4, 8)
    layer.binarize_weight = False
    assert (layer.weight_bits, layer.input_bits) == (32, 1)
    assert torch.equal(layer(x), nn.functional.linear(torch.where(x >= 0, 1.0, -1.0), layer.weight))
    layer.input_quantizer.binarize = False
    assert (layer.weight_bits, layer.input_bits) == (32, 32)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight))


def test_binary_linear_from_float_and_constructor_arguments():
    linear = nn.Linear(6, 4, dtype=torch.float64)
    layer = BinaryLinear.from_float(linear)
    assert torch.equal(layer.weight, linear.weight) and torch.equal(layer.bias, linear.bias)
    assert layer.weight.data_ptr() != linear.weight.data_ptr()
    assert layer.input_quantizer.gamma.dtype == torch.float64
    assert BinaryLinear(6, 4, bias=False).bias is None
    assert BinaryLinear(6, 4, device="meta").input_quantizer.gamma.is_meta
    assert "weight_bits=1, input_bits=1" in repr(layer)


def test_rsign_and_rprelu_start_neutral():
    x = torch.linspace(-2, 2, 12).view(3, 4)
    assert torch.equal(RSign(4)(x), torch.where(x >= 0, 1.0, -1.0))
    assert torch.allclose(RPReLU(4)(x), nn.functional.prelu(x, torch.tensor(0.25)))


def test_softmax_threshold_equals_the_rule_without_exponential():
    torch.manual_seed(0)
    scores = torch.randn(2, 3, 5, 7, dtype=torch.float64) * 2
    scores[0, 0, 0, 3] = -torch.inf
    weights = SoftmaxThreshold(0.25)(scores)
    selected = scores.numpy() >= scores.numpy().max(-1, keepdims=True) - math.log(4)
    assert not selected[0, 0, 0, 3]
    np.testing.assert_allclose(weights.numpy(), selected / selected.sum(-1, keepdims=True), rtol=1e-12)


def test_softmax_threshold_gradient_passes_through_the_softmax():
    torch.manual_seed(0)
    scores = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(2, 6, dtype=torch.float64)
    weights = SoftmaxThreshold()(scores)
    weights.backward(grad)
    p = scores.detach().softmax(-1).numpy()
    count = (weights > 0).sum(-1, keepdim=True).numpy()
    upstream = grad.numpy() / count
    expected = p * (upstream - (upstream * p).sum(-1, keepdims=True))
    np.testing.assert_allclose(scores.grad.numpy(), expected, atol=1e-12)


def test_softmax_threshold_keeps_a_masked_key_out_even_at_the_smallest_ratio():
    scores = torch.tensor([[0.0, -torch.inf, -200.0]])
    assert SoftmaxThreshold(1e-30)(scores).tolist()[0][1] == 0
    with pytest.raises(ValueError, match=r"ratio must lie in \(0, 1\], got 0"):
        SoftmaxThreshold(0)


def test_softmax_threshold_switched_off_is_the_softmax():
    quantizer = SoftmaxThreshold()
    quantizer.binarize = False
    scores = torch.randn(3, 4)
    assert torch.equal(quantizer(scores), scores.softmax(-1)) and quantizer.bits == 32
