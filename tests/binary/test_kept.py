"""Keeping bits for the backward pass: the same values and gradients as keeping floats, and fewer bytes."""

from contextlib import contextmanager
from functools import partial

import pytest
import torch
from mmdet.models import SwinTransformer

from mmbivit.binary import (
    RECIPES,
    BinaryConv2d,
    BinaryConvTranspose2d,
    BinaryLinear,
    RSign,
    ScaledSign,
    WeightSign,
)
from mmbivit.binary.bits import pack_all, unpack_all
from mmbivit.models import BinarySwinTransformer
from mmbivit.packed import kernels

BINARY = [name for name in RECIPES if name != "float"]


@pytest.fixture(autouse=True)
def torch_form():
    """Without native kernels, which have tests of their own: tests/packed/test_training.py."""
    with kernels.use_path("reference"):
        yield


def build(recipe, stage, keep_bits=False):
    torch.manual_seed(0)
    network = BinarySwinTransformer(
        dict(embed_dims=16, depths=(2, 1), num_heads=(1, 2)),
        recipe=dict(base=recipe, keep_bits=keep_bits),
        spatial_interaction=dict(ratio=1.0, alpha_init=0.5),
        out_indices=(0, 1),
        drop_path_rate=0.0,
    )
    network.set_stage(stage)
    return network.train()


@contextmanager
def counted(module):
    """Count the bytes that are kept for the backward pass, each storage once, parameters left out."""
    kept, own = {}, {p.untyped_storage().data_ptr() for p in module.parameters()}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield lambda: sum(size for size, _ in kept.values())


def step(network, dtype=None):
    """Return outputs, gradients and the bytes that were kept."""
    images = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    with counted(network) as kept, torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        outputs = network(images)
    sum(out.float().square().mean() for out in outputs).backward()
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    return outputs, gradients, kept()


@pytest.mark.parametrize("shape", [(1,), (7, 1), (8,), (3, 5, 7), (4, 16)])
def test_bits_of_any_shape_come_back(shape):
    bits = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.5
    packed = pack_all(bits)
    assert packed.shape == (-(-bits.numel() // 8),) and packed.dtype == torch.uint8
    assert [int(packed[i // 8]) >> i % 8 & 1 for i in range(bits.numel())] == bits.flatten().int().tolist()
    assert torch.equal(unpack_all(packed, shape), bits)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("recipe", BINARY)
def test_gradients_equal_those_of_the_specification(recipe, stage):
    ours, plain = build(recipe, stage, keep_bits=True), build(recipe, stage)
    (outputs, gradients, kept), (expected, expected_gradients, floats) = step(ours), step(plain)
    assert all(map(torch.equal, outputs, expected))
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        # the operations are the same; a few sums are taken in another order
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=1e-6, msg=name)
    assert kept < floats


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("native", [False, True])
def test_bytes_are_a_quarter_of_a_float_swin(stage, native):
    sizes = dict(embed_dims=32, depths=(2, 2), num_heads=(1, 2))
    floats = SwinTransformer(**sizes, strides=(4, 2), out_indices=(0, 1), drop_path_rate=0.0)
    ours = BinarySwinTransformer(sizes, recipe="sibivit", spatial_interaction=dict(ratio=1.0), out_indices=(0, 1))
    ours.set_stage(stage)
    for network in (floats, ours):
        network.train()  # not chained: mmdet's returns None
    with kernels.use_path(kernels.available_paths()[0] if native else "reference"):
        assert step(ours)[2] < 0.3 * step(floats)[2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_the_gradients_of_the_specification(dtype):
    ours, plain = build("sibivit", 2, keep_bits=True), build("sibivit", 2)
    (outputs, gradients, _), (expected, expected_gradients, _) = step(ours, dtype), step(plain, dtype)
    assert all(map(torch.equal, outputs, expected))
    for name, gradient in gradients.items():
        assert gradient.dtype == expected_gradients[name].dtype
        error = (gradient - expected_gradients[name]).norm()
        assert error <= 0.02 * expected_gradients[name].norm() + 1e-6, name  # bfloat16 has 8 bits; sums differ in order


@pytest.mark.parametrize("stage", [1, 2])
def test_native_kernels_train_a_backbone_as_torch_does(stage):
    """Where no sum meets its threshold: kernels sum signs as integers, torch adds up floats, which round."""
    ours, plain = build("sibivit", stage, keep_bits=True), build("sibivit", stage)
    for network in (ours, plain):
        generator = torch.Generator().manual_seed(3)
        for name, parameter in network.named_parameters():
            if name.endswith(("gamma", "bias", "zeta")):
                torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    expected, expected_gradients, _ = step(plain)
    with kernels.use_path(kernels.available_paths()[0]):
        outputs, gradients, _ = step(ours)
    for out, other in zip(outputs, expected, strict=True):
        torch.testing.assert_close(out, other, rtol=0, atol=1e-4)
    for name, gradient in gradients.items():
        error = (gradient - expected_gradients[name]).norm()
        assert error <= 1e-4 * expected_gradients[name].norm() + 1e-6, name


@pytest.mark.parametrize("native", [False, True])
def test_gradients_add_up_and_recomputed_blocks_give_the_same(native):
    networks = build("sibivit", 2, keep_bits=True), build("sibivit", 2, keep_bits=True)
    for module in networks[1].modules():
        if hasattr(module, "with_cp"):
            module.with_cp = True
    with kernels.use_path(kernels.available_paths()[0] if native else "reference"):
        once = {name: gradient.clone() for name, gradient in step(networks[0])[1].items()}
        assert all(torch.equal(gradient, once[name]) for name, gradient in step(networks[1])[1].items())
        for name, gradient in step(networks[0])[1].items():
            torch.testing.assert_close(gradient, 2 * once[name], msg=name)


@pytest.mark.slow
def test_torch_compile_takes_it_as_one_graph():
    network = build("sibivit", 2, keep_bits=True)
    expected, gradients, _ = step(network)
    gradients = {name: gradient.clone() for name, gradient in gradients.items()}
    network.zero_grad()
    with kernels.use_path(kernels.available_paths()[0]):  # which compilation leaves out
        outputs = step(torch.compile(network, backend="aot_eager", fullgraph=True))[0]
    assert all(map(torch.equal, outputs, expected))
    for name, parameter in network.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_second_derivative_is_refused():
    x = torch.randn(2, 8, 5, 5, requires_grad=True)
    for layer in (conv(BinaryConv2d, RSign, kernel_size=3), BinaryLinear(5, 4)):
        (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            first.sum().backward()


def conv(kind, quantizer, **options):
    torch.manual_seed(0)
    layer = kind(8, 6, **options, input_quantizer=quantizer(8), weight_quantizer=WeightSign())
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


@pytest.mark.parametrize("binary_weight", [False, True])
@pytest.mark.parametrize("quantizer", [RSign, partial(ScaledSign, groups=4), partial(RSign, ste="poly")])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (BinaryConv2d, dict(kernel_size=3, padding=1)),
        (
            BinaryConv2d,
            dict(kernel_size=(3, 2), stride=(2, 1), dilation=2, padding=2, bias=False, padding_mode="reflect"),
        ),
        (BinaryConv2d, dict(kernel_size=3, padding=1, norm=True, shortcut=True, act=True, like_float=True)),
        (BinaryConvTranspose2d, dict(kernel_size=2, stride=2)),
    ],
)
def test_convolutions_keep_bits(kind, options, quantizer, binary_weight):
    results, kept = [], []
    for keep_bits in (True, False):
        layer = conv(kind, quantizer, **options)
        layer.input_quantizer.keep_bits = layer.weight_quantizer.keep_bits = keep_bits
        layer.weight_quantizer.binarize = binary_weight
        x = torch.randn(2, 8, 7, 9, generator=torch.Generator().manual_seed(1), requires_grad=True)
        with counted(layer) as number:
            y = layer(x)
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2)))
        results.append([y.detach(), x.grad, *(p.grad for p in layer.parameters() if p.requires_grad)])
        kept.append(number())
    (y, *gradients), (expected, *expected_gradients) = results
    assert torch.equal(y, expected)
    for gradient, other in zip(gradients, expected_gradients, strict=True):
        # torch may choose another algorithm of the same convolution
        torch.testing.assert_close(gradient, other, rtol=1e-5, atol=1e-5)
    assert kept[0] < kept[1]
