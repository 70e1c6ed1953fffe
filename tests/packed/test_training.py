"""Training on the native kernels: what the plain layers compute in float64, on every code path."""

import copy

import pytest
import torch
from torch import nn

from mmbivit.binary import BinaryLinear, RPReLU, RSign, WeightSign, product_and_act, scaled_product
from mmbivit.binary.native import native_kernels
from mmbivit.packed import kernels

PATHS = kernels.available_paths()[:-1]


class Pair(nn.Module):
    """A layer and what comes right behind it: an RPReLU, a GELU, a factor for each channel, or nothing."""

    def __init__(self, k, n, stage, behind, bias=True, threshold="channel", **rule):
        super().__init__()
        quantizers = dict(input_quantizer=RSign(k, threshold=threshold), weight_quantizer=WeightSign(**rule))
        self.layer = BinaryLinear(k, n, bias=bias, **quantizers)
        self.layer.weight_quantizer.binarize = stage == 2
        self.act = dict(rprelu=RPReLU(n), gelu=nn.GELU()).get(behind)
        self.alpha = nn.Parameter(torch.empty(5)) if behind == "alpha" else None
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5)
        self.keep(True)

    def keep(self, keep_bits):
        for module in (self.layer, self.layer.input_quantizer, self.layer.weight_quantizer):
            module.keep_bits = keep_bits
        return self

    def forward(self, x):
        if self.alpha is not None:
            return scaled_product(self.layer, self.alpha, x)
        return self.layer(x) if self.act is None else product_and_act(self.layer, self.act, x)


def compute(pair, x):
    """Return the output and the gradients of a random weighting of it."""
    x = x.detach().requires_grad_()
    y = pair(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(y.dtype))
    return dict(y=y.detach(), x=x.grad) | {name: p.grad for name, p in pair.named_parameters()}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        dict(k=96, n=48, behind="rprelu"),
        dict(k=33, n=17, behind="rprelu", bias=False, ste="plain"),
        dict(k=49, n=49, behind="alpha"),
        dict(k=7, n=3, behind="alpha", bias=False, threshold="none"),
        dict(k=300, n=31, behind=None, center="none"),
        dict(k=64, n=40, behind="gelu"),
        dict(k=1, n=1, behind=None, bias=False, ste="identity"),
    ],
    ids=str,
)
def test_products_and_gradients_are_those_of_the_plain_layer(path, stage, options):
    torch.manual_seed(0)
    pair = Pair(stage=stage, **options)
    plain = copy.deepcopy(pair).keep(False).double()
    x = torch.randn(13, 5, options["k"])  # 65 rows: more than are summed up at once
    with kernels.use_path(path):
        assert native_kernels(x) is not None
        found = compute(pair, x)
    expected = compute(plain, x.double())
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.dtype == torch.float32
        # Sums of up to 300 products in float32.
        scale = expected[name].abs().max()
        torch.testing.assert_close(value.double(), expected[name], rtol=0, atol=float(2e-6 * scale), msg=name)


def test_inputs_in_any_layout_give_the_same():
    torch.manual_seed(0)
    pair, x = Pair(k=20, n=9, stage=2, behind=None), torch.randn(5, 20, 13)
    found, expected = compute(pair, x.transpose(1, 2)), compute(copy.deepcopy(pair), x.transpose(1, 2).contiguous())
    pair.zero_grad()
    assert all(torch.equal(found[name], expected[name]) for name in ("y", "x"))


def test_results_do_not_depend_on_the_number_of_threads():
    torch.manual_seed(0)
    pair, x, threads = Pair(k=40, n=24, stage=2, behind="rprelu"), torch.randn(300, 40), torch.get_num_threads()
    found = []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            found.append(compute(copy.deepcopy(pair), x))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0][name], found[1][name]) for name in ("y", "act.slope", "act.zeta"))


def test_frozen_parameters_get_no_gradient():
    torch.manual_seed(0)
    pair = Pair(k=20, n=9, stage=2, behind="rprelu")
    pair.layer.requires_grad_(False)
    found = compute(pair, torch.randn(4, 20))
    assert found["layer.weight"] is None and found["layer.bias"] is None and found["x"].abs().sum() > 0


def test_a_second_derivative_is_refused():
    pair, x = Pair(k=20, n=9, stage=2, behind=None), torch.randn(4, 20, requires_grad=True)
    (first,) = torch.autograd.grad(pair(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_weights_that_change_before_the_backward_pass_are_noticed():
    pair = Pair(k=20, n=9, stage=2, behind=None)
    y = pair(torch.randn(4, 20, requires_grad=True))
    with torch.no_grad():
        pair.layer.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("change", ["dtype", "autocast", "reference"])
def test_kernels_stand_back(change):
    x = torch.zeros(2, 3, dtype=torch.float64 if change == "dtype" else torch.float32)
    path = "reference" if change == "reference" else PATHS[0]
    with kernels.use_path(path), torch.autocast("cpu", torch.bfloat16, enabled=change == "autocast"):
        assert native_kernels(x) is None
