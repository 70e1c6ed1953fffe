"""What quantizers say of themselves, and that a layer uses those that it is given."""

import pytest
import torch
from torch import nn

from mmbivit.binary import (
    ActivationQuantizer,
    BinaryLinear,
    ElasticBinary,
    RSign,
    ScaledSign,
    SoftmaxThreshold,
    WeightQuantizer,
    WeightSign,
    binarize_weight,
)


class Tripled(WeightQuantizer):
    """Three times the weights, with a parameter."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(3.0))

    def forward(self, weight):
        return self.factor * weight if self.binarize else weight


class Negated(ActivationQuantizer):
    def forward(self, x):
        return -x if self.binarize else x


def test_parts_say_their_side_bits_and_extra_numbers():
    weight = torch.randn(5, 9)
    for part, side in ((RSign(4), "activations"), (SoftmaxThreshold(), "activations"), (WeightSign(), "weights")):
        assert part.side == side and part.bits == 1
        part.binarize = False
        assert part.bits == 32
    assert WeightSign().extra_numbers(weight) == 5 and Tripled().extra_numbers(weight) == 0
    assert RSign(4).thresholds.tolist() == [0.0] * 4 and SoftmaxThreshold().thresholds is None
    assert not list(WeightSign().parameters())


def test_folds_are_what_forward_computes():
    torch.manual_seed(0)
    weight = torch.randn(6, 33)
    weight[2] = 0  # theta is 0, and Sign(0) is +1
    weight[3] = 0.5  # mu is the weight itself
    quantizer = WeightSign()
    signs, scale = quantizer.fold(weight)
    expected = quantizer(weight)
    assert torch.equal(torch.where(signs, 1.0, -1.0) * scale[:, None], expected)
    assert torch.equal(signs, weight >= weight.mean(dim=1, keepdim=True)) and signs[2:4].all()
    quantizer.binarize = False
    assert torch.equal(quantizer(weight), weight) and torch.equal(quantizer.fold(weight)[0], signs)

    sign = RSign(7)
    nn.init.normal_(sign.gamma)
    x = torch.randn(50, 7)
    x[0] = sign.gamma.detach()
    thresholds = sign.fold()
    assert thresholds.dtype == torch.float64 and not thresholds.requires_grad
    assert torch.equal(x >= thresholds, sign(x) > 0)
    assert SoftmaxThreshold(0.5).fold() == 0.5


@pytest.mark.parametrize("quantizer", [ScaledSign(6, groups=3), ScaledSign(6, "none"), ElasticBinary(6)], ids=repr)
def test_levels_are_what_the_bits_of_learned_scales_stand_for(quantizer):
    torch.manual_seed(0)
    quantizer.eval()
    nn.init.uniform_(quantizer.scale.value, 0.3, 2.0)
    if quantizer.gamma is not None:
        nn.init.normal_(quantizer.gamma)
    x = torch.randn(50, 6)
    low, high = quantizer.levels().repeat_interleave(6 // quantizer.levels().shape[1], dim=1)
    torch.testing.assert_close(torch.where(x >= quantizer.fold(), high, low).float(), quantizer(x), rtol=0, atol=0)
    assert RSign(4).levels().tolist() == [[-1], [1]]


@pytest.mark.parametrize("fold", [lambda: Negated().fold(), lambda: Tripled().fold(torch.ones(2, 2))])
def test_a_part_that_does_not_fold_says_its_name(fold):
    with pytest.raises(ValueError, match="(Negated|Tripled) does not fold"):
        fold()


def test_a_layer_uses_the_parts_that_it_is_given():
    torch.manual_seed(0)
    linear = nn.Linear(6, 4, dtype=torch.float64)
    layer = BinaryLinear.from_float(linear, input_quantizer=Negated(), weight_quantizer=Tripled())
    x = torch.randn(5, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x), nn.functional.linear(-x, 3 * linear.weight, linear.bias))
    assert layer.weight_quantizer.factor.dtype == torch.float64
    assert list(layer.state_dict()) == ["weight", "bias", "weight_quantizer.factor"]
    layer.binarize_weight = layer.input_quantizer.binarize = False
    assert torch.equal(layer(x), linear(x)) and (layer.weight_bits, layer.input_bits) == (32, 32)


def test_the_default_parts_are_those_of_si_bivit_and_add_one_key():
    layer = BinaryLinear(6, 4)
    assert list(layer.state_dict()) == ["weight", "bias", "input_quantizer.gamma"]
    assert torch.equal(layer.effective_weight(), binarize_weight(layer.weight))
    assert BinaryLinear(6, 4).weight_quantizer is not layer.weight_quantizer
