"""Integer thresholds against the functions they replace, for every count."""

import pytest
import torch
from torch import nn

from mmbivit.binary import BinaryLinear, RPReLU, RSign
from mmbivit.deploy.folding import hidden_thresholds, norm_affine, sign_affine
from mmbivit.packed.thresholds import bits_from_counts, count_thresholds

COUNTS = torch.arange(14)


@pytest.mark.parametrize(
    "zeros",
    [range(0), range(14), range(5), range(5, 14), range(4, 9), [0, 1, 11, 12, 13], [0], [13], [7], range(1, 14)],
    ids=str,
)
def test_one_range_of_zeros_on_the_circle(zeros):
    fires = torch.ones(1, 14, dtype=torch.bool)
    fires[0, list(zeros)] = False
    thresholds = count_thresholds(fires)
    assert thresholds.shape == (2, 1) and thresholds.dtype == torch.int32
    assert torch.equal(bits_from_counts(COUNTS[:, None], thresholds)[:, 0], fires[0])


def test_several_ranges_are_refused():
    fires = torch.ones(3, 14, dtype=torch.bool)
    fires[2, [3, 6]] = False
    with pytest.raises(ValueError, match="unit 2 changes more than twice over its 14 possible inputs"):
        count_thresholds(fires)


def rprelu(units: int) -> RPReLU:
    act = RPReLU(units)
    nn.init.normal_(act.gamma, std=0.3)
    nn.init.normal_(act.slope, std=1.0)  # half of them negative
    nn.init.normal_(act.zeta, std=0.3)
    return act


@pytest.mark.parametrize("make", [rprelu, lambda units: nn.GELU(), lambda units: nn.ReLU(), lambda units: None])
@pytest.mark.parametrize("width", [1, 31, 64, 97])
def test_hidden_bits_equal_the_sign_of_the_function(make, width):
    layer, quantizer, act = BinaryLinear(width, 40), RSign(40), make(40)
    nn.init.normal_(layer.bias, std=0.3)
    nn.init.normal_(quantizer.gamma, std=0.2)
    thresholds = hidden_thresholds(layer, quantizer, act)
    # Rows with 0 to `width` differing bits, in float64: the accumulators are exact there.
    signs = layer.effective_weight().sign().double()
    for count in range(width + 1):
        inputs = signs.clone()
        inputs[:, :count] *= -1
        y = (inputs * layer.effective_weight().double()).sum(dim=1) + layer.bias.double()
        y = y if act is None else act.double()(y)
        expected = y >= quantizer.gamma.double()
        assert torch.equal(bits_from_counts(torch.full((40,), count), thresholds), expected)


def test_unknown_function_is_refused():
    with pytest.raises(ValueError, match="activation function Softmax is unknown"):
        hidden_thresholds(BinaryLinear(8, 4), RSign(4), nn.Softmax(dim=-1))


def test_sign_affine_equals_norm_and_threshold_also_with_negative_gain():
    norm, quantizer = nn.BatchNorm1d(24).eval(), RSign(24)
    for tensor in (norm.running_mean, norm.weight, norm.bias, quantizer.gamma):
        nn.init.normal_(tensor)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    assert (norm.weight < 0).any() and (norm.weight > 0).any()
    x = torch.randn(200, 24)
    gain, shift = sign_affine(norm, quantizer)
    assert torch.equal(x.double() * gain[:24] + shift[:24] >= 0, norm.double()(x.double()) >= quantizer.gamma.double())
    assert gain[24:].tolist() == [0.0] * 8 and shift[24:].tolist() == [-1.0] * 8


@pytest.mark.parametrize("norm", [nn.LayerNorm(8), nn.BatchNorm1d(8, track_running_stats=False)])
def test_other_norms_are_refused(norm):
    with pytest.raises(ValueError, match=f"{type(norm).__name__} cannot be folded"):
        norm_affine(norm, 8)


def test_norm_without_parameters():
    norm = nn.BatchNorm1d(4, affine=False).eval()
    nn.init.normal_(norm.running_mean)
    gain, shift = norm_affine(norm, 4)
    x = torch.randn(9, 4)
    torch.testing.assert_close((x * gain + shift).float(), norm(x), rtol=1e-5, atol=1e-6)
