"""The dual branch against an explicit loop over windows and channels."""

import pytest
import torch
from torch import nn

from mmbivit.binary import binarize_weight, get_recipe, rprelu
from mmbivit.models.layout import WindowLayout
from mmbivit.models.mlp import DualBranchMLP, SpatialInteraction


def make(hidden_ratio=1.0, recipe="sibivit", **options):
    torch.manual_seed(0)
    recipe = get_recipe(recipe)
    mlp = DualBranchMLP(6, 18, recipe, SpatialInteraction(6, 16, hidden_ratio, recipe, **options))
    for name, parameter in mlp.named_parameters():
        if name.endswith(("gamma", "zeta", "act.slope")):
            nn.init.normal_(parameter, std=0.3)
    return mlp.eval()


@pytest.mark.parametrize("shift", [0, 2])
def test_alpha_zero_equals_the_mlp_branch_exactly(shift):
    mlp = make()
    layout = WindowLayout((5, 7), 4, shift)
    x = torch.randn(2, 35, 6)
    both = mlp(x, layout)
    mlp.si.active = False
    assert torch.equal(both, mlp(x, layout))
    mlp.si.active = True
    nn.init.normal_(mlp.si.alpha)
    assert not torch.allclose(both, mlp(x, layout))


@pytest.mark.parametrize("per", ["token", "channel"])
@pytest.mark.parametrize("ratio", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("shift", [0, 2])
def test_token_mixing_equals_a_loop_over_windows_and_channels(ratio, shift, per):
    mlp = make(ratio, per=per)
    si = mlp.si
    parts = [si.fc1.input_quantizer, si.act, si.fc2.input_quantizer]
    quantizer1, act, quantizer2 = parts if per == "token" else [part.part for part in parts]
    sizes = [len(part.gamma) for part in (quantizer1, act, quantizer2)]
    assert sizes == ([16, int(16 * ratio), int(16 * ratio)] if per == "token" else [6, 6, 6])
    nn.init.normal_(si.alpha)
    height, width, size = 5, 7, 4
    x = torch.randn(2, height * width, 6)
    layout = WindowLayout((height, width), size, shift)
    mixed = mlp(x, layout)
    si.active = False
    mixed = mixed - mlp(x, layout)

    normed = (x - si.norm.running_mean) / (si.norm.running_var + si.norm.eps).sqrt()
    padded = torch.zeros(2, 8, 8, 6)
    padded[:, :height, :width] = normed.view(2, height, width, 6)
    out = torch.zeros(2, 8, 8, 6)
    for image in range(2):
        for top in (0, 4):
            for left in (0, 4):
                slots = [((top + y + shift) % 8, (left + c + shift) % 8) for y in range(size) for c in range(size)]
                for channel in range(6):
                    tokens = torch.stack([padded[image, row, column, channel] for row, column in slots])
                    own = slice(None) if per == "token" else slice(channel, channel + 1)
                    signs = torch.where(tokens - quantizer1.gamma[own] >= 0, 1.0, -1.0)
                    hidden = binarize_weight(si.fc1.weight) @ signs + si.fc1.bias
                    hidden = rprelu(hidden, act.gamma[own], act.slope[own], act.zeta[own])
                    signs = torch.where(hidden - quantizer2.gamma[own] >= 0, 1.0, -1.0)
                    result = binarize_weight(si.fc2.weight) @ signs + si.fc2.bias
                    for slot, (row, column) in enumerate(slots):
                        out[image, row, column, channel] = si.alpha[channel] * result[slot]
    expected = out[:, :height, :width].reshape(2, -1, 6)
    assert torch.allclose(mixed, expected, atol=1e-5)  # sums of up to 50 float32 terms around 1


def test_hidden_tokens_follow_the_ratio_and_must_exist():
    assert make(0.5).si.fc1.out_features == 8
    with pytest.raises(ValueError, match="leaves no hidden token of 16"):
        make(0.01)


def test_alpha_starts_where_it_is_told_to():
    assert make().si.alpha.tolist() == [0.0] * 6
    assert make(alpha_init=0.1).si.alpha.tolist() == pytest.approx([0.1] * 6)
