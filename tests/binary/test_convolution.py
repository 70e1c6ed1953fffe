"""Binary convolutions against loops over bits in NumPy, at the border, too."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mmbivit.binary import RECIPES, BinaryConv2d, BinaryConvTranspose2d, binarize_weight


def count_bits(x, weight, gamma, stride, padding, dilation):
    """``theta * (2 * popcount(XNOR) - K)``, with what padding adds as the bit of 0."""
    batch, channels, height, width = x.shape
    outputs, _, kh, kw = weight.shape
    bits = np.zeros((batch, channels, height + 2 * padding[0], width + 2 * padding[1]), bool)
    bits[:] = (gamma <= 0)[None, :, None, None]
    rows, columns = slice(padding[0], padding[0] + height), slice(padding[1], padding[1] + width)
    bits[:, :, rows, columns] = x >= gamma[None, :, None, None]
    mean = weight.reshape(outputs, -1).mean(1)[:, None, None, None]
    theta = np.abs(weight).reshape(outputs, -1).mean(1)
    weight_bits = weight - mean >= 0
    out_h = (bits.shape[2] - dilation[0] * (kh - 1) - 1) // stride[0] + 1
    out_w = (bits.shape[3] - dilation[1] * (kw - 1) - 1) // stride[1] + 1
    result = np.zeros((batch, outputs, out_h, out_w))
    for i in range(out_h):
        for j in range(out_w):
            rows = i * stride[0] + dilation[0] * np.arange(kh)
            columns = j * stride[1] + dilation[1] * np.arange(kw)
            window = bits[:, :, rows[:, None], columns[None, :]]
            agree = (window[:, None] == weight_bits[None]).sum(axis=(2, 3, 4))
            result[:, :, i, j] = theta * (2 * agree - channels * kh * kw)
    return result


@pytest.mark.parametrize("channels", [1, 3, 31, 33])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [
        ((3, 3), (1, 1), (1, 1), (1, 1)),
        ((3, 3), (2, 2), (1, 1), (1, 1)),
        ((1, 1), (1, 1), (0, 0), (1, 1)),
        ((3, 2), (1, 2), (2, 0), (2, 1)),
    ],
)
def test_product_equals_counted_bits(channels, kernel, stride, padding, dilation):
    torch.manual_seed(0)
    conv = BinaryConv2d(channels, 5, kernel, stride, padding, dilation, bias=False)
    nn.init.normal_(conv.input_quantizer.gamma)
    x = torch.randn(2, channels, 7, 6)
    x[0, 0, 0, :3] = conv.input_quantizer.gamma[0].detach()  # exactly at the threshold
    expected = count_bits(
        *(x.numpy(), conv.weight.detach().numpy(), conv.input_quantizer.gamma.detach().numpy()),
        *(stride, padding, dilation),
    )
    torch.testing.assert_close(conv(x), torch.tensor(expected, dtype=torch.float32), rtol=1e-5, atol=1e-5)


def test_gradients_are_those_of_a_convolution_of_signs():
    torch.manual_seed(0)
    conv = BinaryConv2d(4, 3, 3, padding=1)
    x = (torch.randn(2, 4, 5, 6) * 2).requires_grad_()
    conv(x).sin().sum().backward()

    padded = F.pad(x.detach(), (1, 1, 1, 1))
    signs = torch.where(padded >= 0, 1.0, -1.0).requires_grad_()
    rows = conv.weight.detach().flatten(1)
    binary = binarize_weight(rows).view_as(conv.weight).requires_grad_()
    F.conv2d(signs, binary, conv.bias.detach()).sin().sum().backward()
    passed = signs.grad * (padded.abs() <= 1)
    torch.testing.assert_close(x.grad, passed[:, :, 1:-1, 1:-1])
    torch.testing.assert_close(conv.input_quantizer.gamma.grad, -passed.sum((0, 2, 3)))
    latent = rows.clone().requires_grad_()
    binarize_weight(latent).backward(binary.grad.flatten(1))
    torch.testing.assert_close(conv.weight.grad.flatten(1), latent.grad)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_other_padding_repeats_bits(mode):
    torch.manual_seed(0)
    conv = BinaryConv2d(3, 2, 3, padding=1, padding_mode=mode, bias=False)
    x = torch.randn(1, 3, 5, 4)
    signs = F.pad(torch.where(x >= 0, 1.0, -1.0), (1, 1, 1, 1), mode=mode)
    torch.testing.assert_close(conv(x), F.conv2d(signs, conv.effective_weight()))


def test_both_sides_are_float_where_their_quantizers_are_off():
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1)
    binary = BinaryConv2d.from_float(conv)
    binary.input_quantizer.binarize = binary.weight_quantizer.binarize = False
    x = torch.randn(2, 4, 7, 5)
    torch.testing.assert_close(binary(x), conv(x))
    assert (binary.weight_bits, binary.input_bits, binary.product_bits) == (32, 32, ((32, 32),))


def test_norm_shortcut_and_activation_follow_the_product():
    torch.manual_seed(0)
    conv = BinaryConv2d(4, 8, 3, stride=2, padding=1, norm=True, shortcut=True, act=True).eval()
    conv.norm.running_mean.normal_()
    conv.norm.running_var.uniform_(0.5, 2)
    x = torch.randn(2, 4, 5, 7)
    y = F.conv2d(torch.where(F.pad(x, (1, 1, 1, 1)) >= 0, 1.0, -1.0), conv.effective_weight(), None, 2)
    mean, var = (t.view(-1, 1, 1) for t in (conv.norm.running_mean, conv.norm.running_var))
    pooled = torch.stack(  # windows that the border cuts are averaged over what is there
        [
            torch.stack([x[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean((2, 3)) for j in range(4)], dim=-1)
            for i in range(3)
        ],
        dim=-2,
    )
    expected = (y - mean) / (var + 1e-5).sqrt() + torch.cat([pooled, pooled], dim=1)
    torch.testing.assert_close(conv(x), torch.where(expected > 0, expected, 0.25 * expected), rtol=1e-4, atol=1e-5)


def test_levels_share_the_statistics_that_evaluation_uses():
    torch.manual_seed(0)
    conv = BinaryConv2d(4, 4, 3, padding=1, norm=True, shortcut=True, act=True)
    maps = [torch.randn(2, 4, 6, 5), 3 + torch.randn(2, 4, 3, 2)]
    conv.norm.momentum = 1.0  # running statistics are those of the last batch
    trained = conv.over_levels(maps)
    conv.eval()
    sizes = sum(x[:, 0].numel() for x in maps)
    conv.norm.running_var *= (sizes - 1) / sizes  # torch keeps the unbiased variance
    for ours, x in zip(trained, maps, strict=True):
        torch.testing.assert_close(ours, conv(x), rtol=1e-4, atol=1e-5)


def test_transposed_convolution_multiplies_signs():
    torch.manual_seed(0)
    float_conv = nn.ConvTranspose2d(5, 3, 2, stride=2)
    conv = BinaryConvTranspose2d.from_float(float_conv)
    nn.init.normal_(conv.input_quantizer.gamma)
    x = torch.randn(2, 5, 3, 4)
    signs = torch.where(x >= conv.input_quantizer.gamma.view(-1, 1, 1), 1.0, -1.0)
    weight = float_conv.weight.detach()
    mean, theta = weight.mean((0, 2, 3), keepdim=True), weight.abs().mean((0, 2, 3), keepdim=True)
    binary = theta * torch.where(weight >= mean, 1.0, -1.0)
    torch.testing.assert_close(conv(x), F.conv_transpose2d(signs, binary, float_conv.bias, 2))
    signs, scale = conv.folded_weight()
    torch.testing.assert_close(scale, theta.flatten())
    assert torch.equal(signs, (binary > 0).transpose(0, 1).flatten(1))


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "float"])
def test_it_takes_the_parts_of_every_recipe(recipe):
    torch.manual_seed(0)
    conv = BinaryConv2d(4, 6, 3, padding=1, **RECIPES[recipe].build_quantizers(4, 6))
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    conv(x).square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in conv.parameters())
    seen = []
    conv.input_quantizer.register_forward_hook(lambda module, args, output: seen.append(output))
    conv(x)
    assert seen[0].shape == (2, 7, 7, 4) and len(seen[0].unique()) == 2  # padding included
    assert all(len(row.abs().unique()) == 1 for row in conv.effective_weight().flatten(1))


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: BinaryConv2d(4, 4, 3, groups=2), "groups=2"),
        (lambda: BinaryConv2d.from_float(nn.ConvTranspose2d(4, 4, 2, 2)), "ConvTranspose2d cannot be made binary"),
        (lambda: BinaryConvTranspose2d(4, 4, 3, 2), "kernel_size=3 and stride=2"),
        (lambda: BinaryConvTranspose2d.from_float(nn.ConvTranspose2d(4, 4, 2, 2, groups=2)), "padding or groups"),
    ],
)
def test_what_cannot_be_binary_is_refused(build, reason):
    with pytest.raises(ValueError, match=reason):
        build()
