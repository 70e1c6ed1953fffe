"""Parts of the other methods' recipes, forward and backward, against NumPy written from the formulas."""

import numpy as np
import pytest
import torch
from torch import nn

from mmbivit.binary import (
    BinaryLinear,
    ElasticAttention,
    ElasticBinary,
    HeadShortcut,
    LearnedScaleWeightSign,
    ResidualBinaryLinear,
    ScaledSign,
    ScoreSign,
    SoftmaxThreshold,
    binarize_weight,
    elastic_binary,
    repeat_or_average,
    scaled_sign,
    score_sign,
)


def leaf(array):
    return torch.tensor(array, dtype=torch.float64, requires_grad=True)


def close(tensor, array):
    np.testing.assert_allclose(tensor.detach().numpy(), array, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("with_gamma", [False, True])
def test_scaled_sign(with_gamma):
    """alpha * sign(x'), dx = g 1[|x'| <= alpha], dalpha = sum g sign(x') / sqrt(n), a scale for each half."""
    rng = np.random.default_rng(0)
    x, grad = rng.normal(size=(3, 5, 4)), rng.normal(size=(3, 5, 4))
    scale, gamma = np.array([0.5, 1.5]), rng.normal(size=4) if with_gamma else np.zeros(4)
    gamma, x = np.round(gamma * 8) / 8, np.round(x * 8) / 8  # exact in binary, so that the edges stay edges
    scales = np.repeat(scale, 2)
    x[0, 0], x[0, 1], x[0, 2] = gamma, gamma + scales, gamma - scales
    shifted = x - gamma
    signs = np.where(shifted >= 0, 1.0, -1.0)
    inputs = leaf(x), leaf(scale), leaf(gamma) if with_gamma else None
    output = scaled_sign(*inputs)
    output.backward(torch.tensor(grad))
    close(output, scales * signs)
    passed = grad * (np.abs(shifted) <= scales)
    close(inputs[0].grad, passed)
    close(inputs[1].grad, (grad * signs).reshape(-1, 2, 2).sum(axis=(0, 2)) / np.sqrt(3 * 5 * 2))
    if with_gamma:
        close(inputs[2].grad, -passed.sum(axis=(0, 1)))


@pytest.mark.parametrize("scale_gradient", [True, False])
def test_elastic_binary(scale_gradient):
    """alpha * round(clip(x / alpha, 0, 1)), and its gradients of x and alpha; a scale for each head."""
    rng = np.random.default_rng(1)
    x, grad = rng.uniform(-0.2, 1.5, size=(2, 3, 4, 4)), rng.normal(size=(2, 3, 4, 4))
    scale = np.array([0.25, 0.5, 1.0]).reshape(3, 1, 1)
    x[0, :, 0, 0] = 0
    x[0, :, 0, 1] = scale[:, 0, 0] / 2  # ties are rounded up
    x[0, :, 0, 2] = scale[:, 0, 0]
    q = x / scale
    rounded = np.floor(np.clip(q, 0, 1) + 0.5)
    inputs = leaf(x), leaf(scale)
    output = elastic_binary(*inputs, scale_gradient)
    output.backward(torch.tensor(grad))
    close(output, scale * rounded)
    close(inputs[0].grad, grad * ((q >= 0) & (q <= 1)))
    slope = np.where((q > 0) & (q < 1), rounded - q, np.where(q >= 1, 1.0, 0.0))
    expected = (grad * slope).sum(axis=(0, 2, 3)).reshape(3, 1, 1)
    close(inputs[1].grad, expected / np.sqrt(2 * 4 * 4) if scale_gradient else expected)


@pytest.mark.parametrize("zero", [True, False])
def test_score_sign(zero):
    """BiBERT selects a key exactly where its score is positive; masked keys never, and get no gradient."""
    scores = np.array([[-np.inf, -1.0, -0.5, -0.0, 0.0, 0.5, 1.0, 3.0]])
    selected = [[0, 0, 0, zero, zero, 1, 1, 1]]
    passed = [[0, zero, 1, 1, 1, 1, zero, 0]]
    grad = np.random.default_rng(2).normal(size=scores.shape)
    inputs = leaf(scores)
    output = score_sign(inputs, zero)
    output.backward(torch.tensor(grad))
    close(output, np.array(selected, float))
    close(inputs.grad, grad * np.array(passed, float))


@pytest.mark.parametrize("ste", ["theta", "plain", "identity"])
@pytest.mark.parametrize("center", ["row", "none"])
def test_weights_with_learned_scales(ste, center):
    """gamma * sign(w - mu): dgamma = sum g sign over the row; dw = gamma g 1[|w - mu| <= 1], centred where mu is."""
    rng = np.random.default_rng(3)
    weight, grad, gamma = rng.normal(size=(3, 6)), rng.normal(size=(3, 6)), np.array([0.3, -0.7, 2.0])
    weight[0, 0] = 0
    centred = weight - weight.mean(1, keepdims=True) if center == "row" else weight
    signs = np.where(centred >= 0, 1.0, -1.0)
    inputs = leaf(weight), leaf(gamma)
    output = binarize_weight(inputs[0], ste, center, inputs[1])
    output.backward(torch.tensor(grad))
    close(output, gamma[:, None] * signs)
    close(inputs[1].grad, (grad * signs).sum(1))
    expected = grad
    if ste != "identity":
        expected = grad * (np.abs(centred) <= 1) * (gamma[:, None] if ste == "theta" else 1)
        if center == "row":
            expected = expected - expected.mean(1, keepdims=True)
    close(inputs[0].grad, expected)


def test_a_bi_vit_window_follows_its_scale():
    """Eq. 11: the gradient of a head passes where |a| <= alpha of that head, whatever alpha has become."""
    quantizer = ScaledSign(6, "none", groups=3)
    x = torch.tensor([[-0.5, 0.5, 1.0, 2.0, 0.1, 5.0]], requires_grad=True)
    for alphas, passes in (((1.0, 1.0, 1.0), [1, 1, 1, 0, 1, 0]), ((0.2, 3.0, 0.1), [0, 0, 1, 1, 1, 0])):
        quantizer.scale.value.data = torch.tensor(alphas)
        quantizer.eval()
        (grad,) = torch.autograd.grad(quantizer(x).sum(), x)
        assert grad.tolist() == [passes]


def test_scales_start_from_the_first_batch_of_training():
    generator = torch.Generator().manual_seed(4)
    batches = [torch.randn(5, 4, generator=generator) for _ in range(2)]
    quantizer = ScaledSign(4, groups=2)
    quantizer.gamma.data.fill_(0.1)
    assert quantizer.eval()(batches[1]).abs().unique().tolist() == [1.0]  # evaluation starts nothing
    quantizer.train()
    quantizer.binarize = False  # as in a stage with float activations
    assert quantizer(batches[0]) is batches[0]
    quantizer.binarize = True
    quantizer(batches[1])
    expected = 2 * np.abs(batches[0].numpy() - np.float32(0.1)).reshape(5, 2, 2).mean(axis=(0, 2))
    close(quantizer.scale.value, expected)
    # A checkpoint says so: what loads it goes on.
    other = ScaledSign(4, groups=2)
    other.load_state_dict(quantizer.state_dict())
    other(batches[1])
    assert torch.equal(other.scale.value, quantizer.scale.value)


def test_where_each_part_starts():
    generator = torch.Generator().manual_seed(5)
    x, scores = torch.randn(7, 4, generator=generator).relu(), torch.randn(2, 3, 4, 4, generator=generator)
    probabilities = scores.softmax(-1).numpy()
    elastic, one, heads = ElasticBinary(4), ElasticAttention(), ElasticAttention(3, factor=2.0)
    elastic(x), one(scores), heads(scores)
    close(elastic.scale.value, [4 * x.numpy().mean()])
    close(one.scale.value, [1.0])  # rows of four keys have a mean of 1/4
    close(heads.scale.value, 2 * probabilities.mean(axis=(0, 2, 3)))
    fixed = ElasticAttention(start=0.005)
    fixed(scores)
    close(fixed.scale.value, np.float32([0.005]))
    layer = BinaryLinear(4, 3, weight_quantizer=LearnedScaleWeightSign(3))
    layer(x)
    close(layer.weight_quantizer.scale.value, layer.weight.detach().abs().mean(1).numpy())


def test_scales_below_the_smallest_are_used_as_it_and_still_learn():
    quantizer = ScaledSign(2, "none")
    quantizer.scale.value.data.fill_(-3.0)
    output = quantizer.eval()(torch.tensor([[1.0, -1.0]]))
    assert output.tolist() == [[pytest.approx(1e-5), pytest.approx(-1e-5)]]
    output[0, 0].backward()
    assert quantizer.scale.value.grad.item() == pytest.approx(1 / 2**0.5)


def test_attention_of_each_method_in_both_stages():
    scores = torch.randn(1, 2, 3, 5, generator=torch.Generator().manual_seed(6))
    scores[..., 4] = -torch.inf
    softmax = scores.softmax(-1)
    parts = (SoftmaxThreshold(divide=False), ScoreSign(), ElasticAttention(), ElasticAttention(2))
    for part in parts:
        assert set(part(scores)[..., 4].flatten().tolist()) == {0.0}  # masked
        part.binarize = False
        assert torch.equal(part(scores), softmax)
    part = parts[0]
    part.binarize = True
    expected = (softmax >= 0.25 * softmax.amax(-1, keepdim=True)).float()
    expected[..., 4] = 0
    assert torch.equal(part(scores), expected)
    scores.requires_grad_()
    grad = torch.randn(scores.shape, generator=torch.Generator().manual_seed(7))
    (through,) = torch.autograd.grad(part(scores), scores, grad)
    (softmax_only,) = torch.autograd.grad(scores.softmax(-1), scores, grad)
    torch.testing.assert_close(through, softmax_only)


def test_repeat_or_average():
    x = np.random.default_rng(8).normal(size=(2, 6))
    tensor = torch.tensor(x)
    close(repeat_or_average(tensor, 6), x)
    close(repeat_or_average(tensor, 18), np.concatenate([x, x, x], axis=1))
    close(repeat_or_average(tensor, 2), np.stack([x[:, :3].mean(1), x[:, 3:].mean(1)], axis=1))


@pytest.mark.parametrize(("width", "shortcut"), [(4, True), (12, True), (2, True), (6, False)])
def test_a_layer_with_shortcut(width, shortcut):
    """RPReLU(BN(y) + R(x)), BinaryViT Eq. 2, with the statistics of the batch."""
    torch.manual_seed(9)
    layer, x = ResidualBinaryLinear(4, width), torch.randn(3, 5, 4)
    nn.init.normal_(layer.norm.weight), nn.init.normal_(layer.norm.bias), nn.init.normal_(layer.act.gamma)
    assert layer.shortcut == shortcut
    weight = layer.weight.detach().numpy()
    theta, signs = np.abs(weight).mean(1), np.where(weight >= weight.mean(1, keepdims=True), 1.0, -1.0)
    y = np.where(x.numpy() >= 0, 1.0, -1.0) @ (theta[:, None] * signs).T
    normed = (y - y.mean((0, 1))) / np.sqrt(y.var((0, 1)) + 1e-5)
    z = normed * layer.norm.weight.detach().numpy() + layer.norm.bias.detach().numpy()
    if shortcut:
        z = z + repeat_or_average(x, width).numpy()
    z = z - layer.act.gamma.detach().numpy()
    np.testing.assert_allclose(layer(x).detach().numpy(), np.where(z > 0, z, 0.25 * z), rtol=1e-4, atol=1e-4)


def test_the_shortcut_of_heads():
    torch.manual_seed(10)
    part = HeadShortcut(4).eval()
    x, qkv = torch.randn(2, 3, 4), torch.randn(2, 3, 12)
    z = x.numpy() / np.sqrt(1 + 1e-5) + qkv[..., :4].numpy() + qkv[..., 4:8].numpy() + qkv[..., 8:].numpy()
    np.testing.assert_allclose(part(x, qkv).detach().numpy(), np.where(z > 0, z, 0.25 * z), rtol=1e-5, atol=1e-6)
