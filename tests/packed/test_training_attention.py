"""Attention in training, by the kernels on every code path and in plain torch, against the modules that keep floats."""

import itertools

import pytest
import torch

from mmbivit.binary import SoftmaxThreshold, sign_ste
from mmbivit.binary.kept_attention import kept_attention
from mmbivit.packed import kernels
from mmbivit.packed.training_attention import attention_step

NATIVE = kernels.available_paths()[:-1]
FORMS = [*kernels.available_paths(), "torch"]  # the reference of the kernels is the torch form, too
# groups, tokens, heads, head_dim: tiles, vectors and words that are full and not; blocks of 56 queries
SHAPES = [(5, 49, 3, 32), (2, 1, 1, 1), (3, 5, 2, 7), (1, 70, 3, 33), (4, 16, 5, 48), (2, 57, 1, 64), (1, 130, 2, 17)]


@pytest.fixture(params=FORMS)
def attend(request):
    if request.param == "torch":
        yield kept_attention
    else:
        with kernels.use_path(request.param):
            yield attention_step


def by_modules(qkv, gamma, bias, mask, scale, ratio, divide, num_heads):
    batch, tokens, channels = qkv.shape
    signs = sign_ste(qkv, gamma).view(batch, tokens, 3, num_heads, -1)
    query, key, value = signs.permute(2, 0, 3, 1, 4)
    scores = (query * scale) @ key.transpose(-2, -1)
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = scores.view(-1, len(mask), num_heads, tokens, tokens).masked_fill(mask[:, None], -torch.inf)
        scores = scores.view(batch, num_heads, tokens, tokens)
    weights = SoftmaxThreshold(ratio, divide)(scores)
    return (weights @ value).transpose(1, 2).reshape(batch, tokens, channels // 3)


def draw(groups, tokens, heads, head_dim, gamma=True, bias=True, masks=0, divide=True, ratio=0.25):
    """Draw the arguments of the attention."""
    channels = 3 * heads * head_dim
    qkv = torch.randn(groups, tokens, channels)
    mask = None
    if masks:
        mask = torch.rand(masks, tokens, tokens) < 0.4
        mask[:, range(tokens), range(tokens)] = False
    return dict(
        qkv=qkv,
        gamma=torch.randn(channels) * 0.3 if gamma else None,
        bias=torch.randn(heads, tokens, tokens) if bias else None,
        mask=mask,
        scale=head_dim**-0.5,
        ratio=ratio,
        divide=divide,
        num_heads=heads,
    )


def run(function, arguments, grad, dtype=torch.float32):
    """Return the output and the gradients of what has any, of copies of the arguments in a dtype."""
    learned = {name: arguments[name] for name in ("qkv", "gamma", "bias") if arguments[name] is not None}
    learned = {name: value.detach().to(dtype).requires_grad_() for name, value in learned.items()}
    out = function(**{**arguments, **learned})
    out.backward(grad.to(out.dtype))
    return dict(out=out.detach(), **{name: value.grad for name, value in learned.items()})


def assert_same(function, arguments):
    groups, tokens, channels = arguments["qkv"].shape
    grad = torch.randn(groups, tokens, channels // 3)
    expected, actual = run(by_modules, arguments, grad, torch.float64), run(function, arguments, grad)
    if arguments["divide"]:
        # a mean of up to 130 signs is rounded in each step, or at its end
        torch.testing.assert_close(actual["out"].double(), expected["out"], rtol=0, atol=5e-7)
    else:  # a sum of signs is exact: the same keys are selected
        assert torch.equal(actual["out"].double(), expected["out"])
    for name in set(expected) - {"out"}:
        # Sums of up to a few thousand products in another order: a few hundred roundings of 6e-8 of the largest sum.
        tolerance = 1e-5 * expected[name].abs().max().clamp(min=1).item()
        torch.testing.assert_close(actual[name].double(), expected[name], rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("divide", [True, False])
def test_equals_modules(attend, shape, divide):
    torch.manual_seed(0)
    assert_same(attend, draw(*shape, divide=divide))


@pytest.mark.parametrize("gamma, bias, masks", list(itertools.product([True, False], [True, False], [0, 1, 3])))
def test_equals_modules_without_parts(attend, gamma, bias, masks):
    torch.manual_seed(1)
    for shape in ((6, 49, 2, 32), (3, 11, 3, 5)):
        for divide in (True, False):
            assert_same(attend, draw(*shape, gamma=gamma, bias=bias, masks=masks, divide=divide))


@pytest.mark.parametrize("ratio", [0.01, 0.9, 1.0])
def test_equals_modules_with_other_ratios(attend, ratio):
    torch.manual_seed(2)
    assert_same(attend, draw(3, 20, 2, 24, ratio=ratio, divide=False))


def test_signs_of_zero_and_borders_of_the_window(attend):
    """Sign(0) and Sign(-0) are +1; the gradient passes where |x - gamma| is exactly 1, too."""
    torch.manual_seed(3)
    arguments = draw(2, 9, 2, 16, divide=False)
    arguments["qkv"] = torch.randint(-4, 5, arguments["qkv"].shape) / 2 * 1.0
    arguments["qkv"][0] *= -1.0
    arguments["gamma"] = torch.randint(-1, 2, arguments["gamma"].shape) / 2 * 1.0
    assert_same(attend, arguments)
    assert_same(attend, {**arguments, "gamma": None})


def test_keys_far_behind_count_as_nothing(attend):
    torch.manual_seed(4)
    arguments = draw(2, 20, 1, 8, divide=False)
    arguments["bias"][:, :, ::3] -= 300
    assert_same(attend, arguments)
    grads = run(attend, arguments, torch.randn(2, 20, 8))
    assert grads["bias"][:, :, ::3].count_nonzero() == 0


@pytest.mark.parametrize("threads", [1, 2, 5, 16])
def test_threads_share_groups_and_heads(attend, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for groups in (1, 2, 7):
            torch.manual_seed(5)
            arguments, grad = draw(groups, 33, 3, 16, masks=1, divide=False), torch.randn(groups, 33, 48)
            assert_same(attend, arguments)
            first, second = (run(attend, arguments, grad) for _ in range(2))
            assert all(torch.equal(first[name], second[name]) for name in first)
    finally:
        torch.set_num_threads(before)


def test_arguments_need_not_be_contiguous(attend):
    torch.manual_seed(6)
    arguments = draw(3, 10, 2, 8, masks=3, divide=False)
    grad = torch.randn(3, 10, 16)
    expected = run(attend, arguments, grad)
    for name in ("qkv", "bias", "mask"):
        arguments[name] = arguments[name].transpose(1, 2).contiguous().transpose(1, 2)
    arguments["gamma"] = torch.stack([arguments["gamma"]] * 2, dim=1)[:, 0]
    actual = run(attend, arguments, grad.transpose(0, 1).contiguous().transpose(0, 1))
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_gradients_are_computed_where_asked_for(attend):
    torch.manual_seed(7)
    arguments, grad = draw(2, 10, 2, 8), torch.randn(2, 10, 16)
    everything = run(attend, arguments, grad)
    for name in ("qkv", "gamma", "bias"):
        learned = arguments[name].clone().requires_grad_()
        attend(**{**arguments, name: learned}).backward(grad)
        assert torch.equal(learned.grad, everything[name])
    with torch.no_grad():
        assert torch.equal(attend(**arguments), everything["out"])


def test_no_groups(attend):
    arguments = draw(0, 10, 2, 8)
    grads = run(attend, arguments, torch.randn(0, 10, 16))
    assert grads["out"].shape == (0, 10, 16) and grads["qkv"].shape == (0, 10, 48)
    assert grads["gamma"].count_nonzero() == 0 and grads["bias"].count_nonzero() == 0


def test_second_derivatives_are_refused(attend):
    arguments = draw(1, 4, 1, 8)
    qkv = arguments["qkv"].requires_grad_()
    (grad,) = torch.autograd.grad(attend(**arguments).square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_two_bits_are_kept_for_each_value(attend):
    arguments = draw(8, 49, 2, 32)
    qkv, kept = arguments["qkv"].requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        attend(**arguments)
    bias = arguments["bias"].numel()
    assert sum(x.numel() * x.element_size() for x in kept if x.numel() > 2 * bias) == 0
    assert sum(x.numel() * x.element_size() for x in kept if x.dtype != torch.float32) == qkv.numel() * 2 // 8


@pytest.mark.parametrize("path", NATIVE)
def test_kernels_take_float32_and_leave_the_rest_to_torch(path):
    calls = []
    with kernels.use_path(path), kernels.KERNELS.record(lambda args, made: calls.append(type(args).__name__)):
        arguments, grad = draw(2, 5, 1, 8), torch.randn(2, 5, 8)
        run(attention_step, arguments, grad)
        assert calls == ["AttentionBitsArgs", "AttentionGradientsArgs"]
        run(attention_step, arguments, grad, torch.float64)
        assert len(calls) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("divide", [True, False])
def test_autocast_computes_what_the_modules_do(dtype, divide):
    """The same operations in the same dtypes: equal, but for sums of 16-bit floats in another layout."""
    torch.manual_seed(8)
    arguments = draw(4, 20, 2, 16, masks=2, divide=divide)
    grad = torch.randn(4, 20, 32)

    def within(function):
        def called(qkv, **options):
            with torch.autocast("cpu", dtype):
                return function(qkv.to(dtype), **options)

        return called

    expected, *actual = (
        run(within(function), arguments, grad) for function in (by_modules, kept_attention, attention_step)
    )
    for results in actual:
        for name in expected:
            assert results[name].dtype == expected[name].dtype
            tolerance = 4 * torch.finfo(dtype).eps * expected[name].abs().max().item()
            torch.testing.assert_close(results[name], expected[name], rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_torch_takes_other_dtypes(dtype):
    torch.manual_seed(9)
    arguments, grad = draw(2, 12, 2, 8, divide=False), torch.randn(2, 12, 16)
    expected, actual = (run(function, arguments, grad, dtype) for function in (by_modules, attention_step))
    assert torch.equal(actual["out"], expected["out"])
    for name in ("qkv", "gamma", "bias"):
        tolerance = 4 * torch.finfo(dtype).eps * expected[name].abs().max().item()
        torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=tolerance, msg=name)


def test_compiled_networks_take_the_torch_form():
    torch.manual_seed(10)
    arguments, grad = draw(2, 6, 2, 8, divide=False), torch.randn(2, 6, 16)
    compiled = torch.compile(attention_step, backend="aot_eager", fullgraph=True)
    expected, actual = run(attention_step, arguments, grad), run(compiled, arguments, grad)
    assert torch.equal(actual["out"], expected["out"])
    torch.testing.assert_close(actual["qkv"], expected["qkv"], rtol=0, atol=1e-5)
