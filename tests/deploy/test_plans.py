"""Recorded kernel calls of small packed networks: equal to operator by operator, and never of another network."""

import copy
import threading
from contextlib import contextmanager

import pytest
import torch

from mmbivit.deploy import pack
from mmbivit.packed import kernels, network

from .networks import SI, binary_swin
from .test_packed_nest import binary_nest
from .test_packed_vit import binary_vit

pytestmark = pytest.mark.skipif(
    kernels.available_paths()[0] == kernels.REFERENCE, reason="plans are of the native kernels"
)


NETWORKS = dict(
    swin=binary_swin,
    vit=lambda: binary_vit(spatial_interaction=SI),
    residual_vit=lambda: binary_vit(recipe="reactnet", spatial_interaction=SI),
    nest=lambda: binary_nest(spatial_interaction=SI),
)


@contextmanager
def without_plans():
    most, network.MOST_VALUES = network.MOST_VALUES, 0
    try:
        yield
    finally:
        network.MOST_VALUES = most


def recorded(packed) -> list:
    return list(packed._plans.plans.values())


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_equal_those_of_operators(name, threads):
    packed, before = pack(NETWORKS[name]()), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for images in torch.randn(3, 2, 3, 40, 40):
            outputs = packed(images)
            with without_plans():
                expected = packed(images)
            for output, tensor in zip(outputs, expected, strict=True):
                assert torch.equal(output, tensor) and output.stride() == tensor.stride()
    finally:
        torch.set_num_threads(before)
    assert recorded(packed) and None not in recorded(packed)


def test_earlier_outputs_stay_what_they_are():
    packed, images = pack(binary_swin()), torch.randn(3, 1, 3, 32, 32)
    first = packed(images[0])[0].clone()
    second = packed(images[1])[0]
    kept = second.clone()
    packed(images[2])
    assert torch.equal(second, kept) and torch.equal(packed(images[0])[0], first)


def test_each_shape_has_its_own():
    packed = pack(binary_swin())
    for size in [(32, 32), (33, 47), (32, 32), (60, 28)]:
        images = torch.randn(1, 3, *size)
        for _ in range(2):
            outputs = packed(images)
        with without_plans():
            assert all(map(torch.equal, outputs, packed(images)))
    assert len(recorded(packed)) == 3


def test_other_weights_are_seen():
    """Also where loading them makes new tensors of what the operators take."""
    packed, other, images = pack(binary_swin(0)), pack(binary_swin(1)), torch.randn(1, 3, 32, 32)
    packed(images)
    packed.load_state_dict(other.state_dict())
    assert all(map(torch.equal, packed(images), other(images)))
    packed.stages[0].blocks[0].attn.load_state_dict(pack(binary_swin(2)).stages[0].blocks[0].attn.state_dict())
    outputs = packed(images)
    with without_plans():
        assert all(map(torch.equal, outputs, packed(images)))


def test_another_module_is_seen():
    packed, images = pack(binary_swin(0)), torch.randn(1, 3, 32, 32)
    before = packed(images)[1]
    packed.stages[1] = pack(binary_swin(1)).stages[1]
    outputs = packed(images)
    assert not torch.equal(outputs[1], before)
    with without_plans():
        assert all(map(torch.equal, outputs, packed(images)))


def test_copies_have_their_own():
    packed, images = pack(binary_swin()), torch.randn(1, 3, 32, 32)
    expected = packed(images)
    other = copy.deepcopy(packed)
    for buffer in packed.buffers():
        buffer.zero_()
    assert all(map(torch.equal, other(images), expected))
    assert all(map(torch.equal, other(images), expected))


def test_hooks_are_called():
    packed, images, seen = pack(binary_swin()), torch.randn(1, 3, 32, 32), []
    packed(images)
    handle = packed.stages[0].blocks[0].mlp.register_forward_hook(lambda *_: seen.append(1))
    packed(images)
    handle.remove()
    packed(images)
    assert seen == [1]


@pytest.mark.parametrize("recipe", ["bivit", "reactnet"])
def test_what_torch_computes_between_operators_is_computed(recipe):
    """LayerNorm, and the patch merging of residual networks: no plan can hold them."""
    torch.manual_seed(0)
    packed, images = pack(binary_swin(recipe=recipe)), torch.randn(1, 3, 32, 32)
    packed(images)
    assert recorded(packed) == [None]
    assert all(map(torch.equal, packed(images), packed(images)))


def test_threads_do_not_disturb_each_other():
    packed, batches, found = pack(binary_swin()), torch.randn(8, 1, 3, 32, 32), [None] * 8
    expected = [packed(images) for images in batches]

    def run(i):
        for _ in range(20):
            found[i] = packed(batches[i])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for outputs, tensors in zip(found, expected, strict=True):
        assert all(map(torch.equal, outputs, tensors))
