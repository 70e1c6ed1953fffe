"""Values and gradients against NumPy written from SI-BiViT, Eq. 1-5."""

import numpy as np
import pytest
import torch

from mmbivit.binary import binarize_weight, rprelu, sign, sign_ste, straight_through, threshold_mask


def numpy_sign(x):
    return np.array([1.0 if value >= 0 else -1.0 for value in x.ravel()]).reshape(x.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_sign_of_zero_is_one(dtype):
    x = torch.tensor([-2.0, -1e-7, -0.0, 0.0, 1e-7, 3.0, -torch.inf, torch.inf]).to(dtype)
    expected = torch.tensor([-1.0, -1.0, 1.0, 1.0, 1.0, 1.0, -1.0, 1.0]).to(dtype)
    if dtype == torch.float16:
        expected[1] = -1.0  # 1e-7 is a subnormal of half precision, not 0
    assert torch.equal(sign(x), expected)
    assert sign(x).dtype == dtype


def test_sign_ste_matches_equations_2_and_3():
    rng = np.random.default_rng(0)
    x, gamma, grad = rng.normal(size=(2, 5, 4)) * 1.5, rng.normal(size=4), rng.normal(size=(2, 5, 4))
    x[0, 0] = gamma  # exactly at the threshold
    x[0, 1] = gamma + 1  # on the edge of the window
    x[0, 1, 0] = gamma[0] - 1
    gamma, x = np.round(gamma * 8) / 8, np.round(x * 8) / 8  # exact in binary, so that the edges stay edges
    tensor = torch.tensor(x, requires_grad=True)
    threshold = torch.tensor(gamma, requires_grad=True)
    out = sign_ste(tensor, threshold)
    out.backward(torch.tensor(grad))

    inside = np.abs(x - gamma) <= 1
    assert inside[0, 0].all() and not inside.all()
    np.testing.assert_array_equal(out.detach().numpy(), numpy_sign(x - gamma))
    np.testing.assert_array_equal(tensor.grad.numpy(), grad * inside)
    np.testing.assert_allclose(threshold.grad.numpy(), -(grad * inside).sum((0, 1)), rtol=1e-12)


def test_sign_ste_without_threshold():
    x = torch.tensor([-1.5, -1.0, -0.0, 0.0, 1.0, 1.5], requires_grad=True)
    out = sign_ste(x)
    out.sum().backward()
    assert out.tolist() == [-1, -1, 1, 1, 1, 1]
    assert x.grad.tolist() == [0, 1, 1, 1, 1, 0]


@pytest.mark.parametrize("center", ["row", "tensor", "none"])
@pytest.mark.parametrize("scale", ["row", "tensor"])
@pytest.mark.parametrize("ste", ["theta", "plain", "identity"])
def test_binarize_weight_matches_equation_4_and_its_variants(ste, center, scale):
    rng = np.random.default_rng(1)
    weight, grad = rng.normal(size=(3, 6)) + 0.3, rng.normal(size=(3, 6))
    weight[1] *= 3  # some weights outside the straight-through window
    if center == "none":
        weight[2, 0] = 0.0  # a tie: +theta
    tensor = torch.tensor(weight, requires_grad=True)
    out = binarize_weight(tensor, ste, center, scale)
    out.backward(torch.tensor(grad))

    # mu = A w with a matrix A on the flattened weights, so that the derivative of w - mu is the identity minus A.
    row_means = np.kron(np.eye(3), np.full((6, 6), 1 / 6))
    average = dict(row=row_means, tensor=np.full((18, 18), 1 / 18), none=np.zeros((18, 18)))[center]
    centred = weight - (average @ weight.ravel()).reshape(3, 6)
    theta = np.abs(weight).mean(axis=1, keepdims=True) if scale == "row" else np.abs(weight).mean()
    np.testing.assert_allclose(out.detach().numpy(), theta * numpy_sign(centred), rtol=1e-12)
    if ste == "identity":
        expected = grad
    else:
        passed = (theta if ste == "theta" else 1) * grad * (np.abs(centred) <= 1)
        expected = (passed.ravel() @ (np.eye(18) - average)).reshape(3, 6)
    np.testing.assert_allclose(tensor.grad.numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("with_threshold", [True, False])
def test_the_quadratic_surrogate(with_threshold):
    """Bi-Real Net: the derivative of the piecewise quadratic approximation of the sign is 2 - 2 |x| within 1 of 0."""
    rng = np.random.default_rng(4)
    x, gamma, grad = rng.normal(size=(5, 4)) * 1.5, rng.normal(size=4) * with_threshold, rng.normal(size=(5, 4))
    x[0], x[1] = gamma, gamma + 1
    tensor, threshold = torch.tensor(x, requires_grad=True), torch.tensor(gamma, requires_grad=True)
    out = sign_ste(tensor, threshold if with_threshold else None, "poly")
    out.backward(torch.tensor(grad))
    slope = np.maximum(0, 2 - 2 * np.abs(x - gamma))
    np.testing.assert_array_equal(out.detach().numpy(), numpy_sign(x - gamma))
    np.testing.assert_allclose(tensor.grad.numpy(), grad * slope, atol=1e-12)
    if with_threshold:
        np.testing.assert_allclose(threshold.grad.numpy(), -(grad * slope).sum(0), atol=1e-12)


def test_binarize_weight_has_two_values_per_row_even_for_constant_rows():
    weight = torch.zeros(2, 4)
    weight[1] = 0.5
    assert binarize_weight(weight).tolist() == [[0, 0, 0, 0], [0.5, 0.5, 0.5, 0.5]]


def test_rprelu_matches_its_formula_and_autograd():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    gamma, slope, zeta = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    x[0, 0] = gamma  # exactly at the kink
    inputs = [tensor.clone().requires_grad_() for tensor in (x, gamma, slope, zeta)]
    out = rprelu(*inputs)
    shifted = x.numpy() - gamma.numpy()
    expected = np.where(shifted > 0, shifted, shifted * slope.numpy()) + zeta.numpy()
    np.testing.assert_allclose(out.detach().numpy(), expected, rtol=1e-12)

    grad = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    out.backward(grad)
    g, s = grad.numpy(), slope.numpy()
    grad_x = np.where(shifted > 0, g, g * s)
    expected_grads = (
        grad_x,
        -grad_x.sum((0, 1)),
        (g * np.where(shifted > 0, 0, shifted)).sum((0, 1)),
        g.sum((0, 1)),
    )
    for tensor, expected in zip(inputs, expected_grads, strict=True):
        np.testing.assert_allclose(tensor.grad.numpy(), expected, atol=1e-12)


def test_straight_through_has_the_values_of_one_and_the_gradient_of_the_other():
    soft = torch.tensor([0.2, 0.8], requires_grad=True)
    out = straight_through(torch.tensor([0.0, 1.0]), soft)
    (out * torch.tensor([3.0, 5.0])).sum().backward()
    assert out.tolist() == [0, 1]
    assert soft.grad.tolist() == [3, 5]


def test_threshold_mask_selects_from_a_quarter_of_the_maximum_but_never_zero():
    probabilities = torch.tensor([[0.5, 0.125, 0.1249, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert threshold_mask(probabilities, 0.25).tolist() == [[1, 1, 0, 0], [0, 0, 0, 0]]
