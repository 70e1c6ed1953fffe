"""Sizes against a count by hand."""

from torch import nn

from mmbivit.analysis import ModelSize, model_size
from mmbivit.binary import BinaryLinear


def test_bits_scales_and_floats_are_counted_by_hand():
    module = nn.Sequential(nn.Linear(3, 5), BinaryLinear(17, 6))
    # float layer 3 * 5 + 5; binary layer 17 * 6 bits in 3 bytes a row, 6 scales, 6 biases, 17 thresholds
    params = 20 + 102 + 6 + 17
    assert model_size(module) == ModelSize(params, 102, 4 * params, 4 * (20 + 6 + 17) + 6 * 3 + 6 * 4)
    module[1].binarize_weight = False
    assert model_size(module) == ModelSize(params, 0, 4 * params, 4 * params)
