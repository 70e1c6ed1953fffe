"""Sizes against a count by hand."""

import torch
from torch import nn

from mmbivit.analysis import ModelSize, layer_sizes, model_size
from mmbivit.binary import BinaryLinear


def test_bits_scales_and_floats_are_counted_by_hand():
    module = nn.Sequential(nn.Linear(3, 5), BinaryLinear(17, 6))
    # float layer 3 * 5 + 5; binary layer 17 * 6 bits in 13 bytes, 6 scales, 6 biases, 17 thresholds
    params = 20 + 102 + 6 + 17
    assert model_size(module) == ModelSize(params, 102, 4 * params, 4 * (20 + 6 + 17) + 13 + 6 * 4)
    assert layer_sizes(module)["1"] == ModelSize(108, 102, 4 * 108, 13 + 4 * 6 + 4 * 6)
    module[1].binarize_weight = False
    assert model_size(module) == ModelSize(params, 0, 4 * params, 4 * params)


def test_buffers_that_inference_needs_are_counted():
    module = nn.Sequential(nn.BatchNorm1d(5))  # mean and variance are needed, the count of batches is not
    module.register_buffer("index", torch.zeros(100, dtype=torch.long))
    module.register_buffer("made_again", torch.zeros(100), persistent=False)
    assert model_size(module) == ModelSize(10, 0, 4 * 20, 4 * 20)
    module.register_buffer("mean", torch.zeros(3))
    assert model_size(module) == ModelSize(10, 0, 4 * 23, 4 * 23)


def test_what_is_shared_counts_once():
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), BinaryLinear(8, 2, bias=False))
    module[1].weight = module[0].weight
    module.append(module[2])
    # 9 and two times 3; 16 bits, 2 scales, 8 thresholds
    assert model_size(module) == ModelSize(15 + 16 + 8, 16, 4 * 39, 4 * (15 + 8) + 2 + 8)
