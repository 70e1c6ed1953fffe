"""Binary convolution and RoIAlign on every code path, against torch's convolution and torchvision's operator."""

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from mmbivit.binary import BinaryConv2d, BinaryConvTranspose2d, ElasticBinary, ResidualBinaryLinear
from mmbivit.deploy import pack
from mmbivit.deploy.packers.convolution import pack_started_linear
from mmbivit.packed import kernels
from mmbivit.packed.packing import pack_signs, pad_channels, word_blocks
from tests.deploy.networks import randomise

OPS = torch.ops.mmbivit
# kernel, stride, padding, dilation
GEOMETRIES = [
    ((3, 3), (1, 1), (1, 1), (1, 1)),
    ((1, 1), (1, 1), (0, 0), (1, 1)),
    ((3, 3), (2, 2), (1, 1), (1, 1)),
    ((3, 2), (1, 3), (2, 0), (2, 3)),
    ((2, 5), (3, 1), (0, 4), (1, 1)),
]


@pytest.fixture(params=kernels.available_paths())
def path(request):
    with kernels.use_path(request.param):
        yield request.param


def started(layer, x):
    """Draw parameters, and take from a batch what is taken from the first one, and statistics."""
    randomise(layer).train()
    if getattr(layer, "like_float", False) and layer.shortcut:
        nn.init.normal_(layer.shortcut_scale)
    layer(x)
    return layer.eval()


def signs(*shape):
    return (torch.rand(shape) < 0.5).float() * 2 - 1


def packed_kernel(weight):
    taps = (weight > 0).permute(0, 2, 3, 1)
    return word_blocks(pack_signs(taps).flatten(1))


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("channels", [1, 16, 31, 33, 64, 100])
def test_products_of_convolutions_are_exact(path, geometry, channels):
    kernel, stride, padding, dilation = geometry
    for batch, height, width, outputs in ((1, 9, 13, 17), (2, 7, 21, 50), (3, 6, 9, 1)):
        x, weight = torch.randn(batch, height, width, channels), signs(outputs, channels, *kernel)
        x[0, 0], x[0, 1] = 0.0, -0.0
        threshold = torch.randint(-1, 2, (channels,)).float() / 2
        bits = torch.where(F.pad(x, (0, 0, padding[1], padding[1], padding[0], padding[0])) >= threshold, 1.0, -1.0)
        expected = F.conv2d(bits.permute(0, 3, 1, 2), weight, None, stride, 0, dilation)
        identity = torch.stack([torch.ones(outputs), torch.zeros(outputs)])
        actual = OPS.binary_conv2d(
            *(x, pad_channels(threshold), packed_kernel(weight), pad_channels(identity), outputs),
            [*kernel, *stride, *padding, *dilation],
        )
        assert torch.equal(actual.permute(0, 3, 1, 2), expected)


@pytest.mark.parametrize("out_channels", [8, 24, 48])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("like_float", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        dict(kernel_size=3, padding=1, act=True, shortcut=True),
        dict(kernel_size=3, padding=1, stride=2, shortcut=True),
        dict(kernel_size=3, padding="same", padding_mode="reflect", act=True),
        dict(kernel_size=(2, 4), padding="same", shortcut=True),
        dict(kernel_size=3, padding=2, dilation=2, padding_mode="circular", shortcut=True),
    ],
)
def test_packed_convolutions_equal_the_simulated_ones(path, out_channels, norm, like_float, options):
    layer = BinaryConv2d(24, out_channels, norm=norm, like_float=like_float, **options)
    layer = started(layer, torch.randn(4, 24, 8, 8))
    x = torch.randn(2, 24, 9, 11)
    with torch.no_grad():
        expected, actual = layer(x), pack(layer)(x)
    # The simulated product sums rounded floats, ours is one integer.
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=1e-4)
    assert actual.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("options", [{}, dict(like_float=True), dict(like_float=True, norm=True)])
def test_levels_other_than_signs_are_folded(path, options):
    layer = BinaryConv2d(16, 8, 3, padding=1, input_quantizer=ElasticBinary(16), **options)
    x = torch.randn(2, 16, 6, 7).abs()
    layer = started(layer, x)
    with torch.no_grad():
        torch.testing.assert_close(pack(layer)(x), layer(x), rtol=2e-5, atol=1e-5)


def test_a_transposed_convolution_equals_the_simulated_one(path):
    layer = randomise(BinaryConvTranspose2d(20, 12, (2, 3), (2, 3))).eval()
    x = torch.randn(2, 20, 5, 4)
    with torch.no_grad():
        torch.testing.assert_close(pack(layer)(x), layer(x), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("act", [True, False])
@pytest.mark.parametrize("outputs", [12, 36])
def test_linear_layers_that_started_like_float_ones_equal_the_simulated(path, outputs, act):
    for shortcut in (True, False):
        layer = ResidualBinaryLinear(36, outputs, like_float=True, act=act, shortcut=shortcut)
        layer, x = started(layer, torch.randn(50, 36)), torch.randn(7, 36)
        with torch.no_grad():
            torch.testing.assert_close(pack(layer)(x), layer(x), rtol=2e-5, atol=2e-5)
    order = torch.randperm(36)
    with torch.no_grad():
        torch.testing.assert_close(pack_started_linear(layer, order)(x[:, order]), layer(x), rtol=2e-5, atol=2e-5)


def regions(number, batch=2):
    corner, side = torch.rand(number, 2) * torch.tensor([370.0, 230.0]) - 20, torch.rand(number, 2) ** 3 * 400
    side[0] = 0
    rois = torch.cat([torch.randint(0, batch, (number, 1)).float(), corner, corner + side], dim=1)
    rois[1, 1:] = torch.tensor([-900.0, -700.0, 800.0, 1200.0])
    rois[2, 1:] = torch.tensor([5000.0, 10.0, 5100.0, 50.0])  # outside
    return rois


@pytest.mark.parametrize("channels", [1, 20, 64, 70])
@pytest.mark.parametrize(("samples", "aligned"), [(0, True), (0, False), (2, True), (5, False)])
def test_roi_align_equals_torchvision(path, channels, samples, aligned):
    maps = [torch.randn(2, height, width, channels) for height, width in ((50, 84), (25, 42), (13, 21), (1, 1))]
    scales, rois = [1 / 4, 1 / 8, 1 / 16, 1 / 32], regions(60)
    levels = torch.randint(0, 4, (60,))
    actual = OPS.roi_align(maps, rois, levels, scales, [7, 5], samples, aligned)
    for level, (x, scale) in enumerate(zip(maps, scales, strict=True)):
        found, x = levels == level, x.permute(0, 3, 1, 2)
        expected = torchvision.ops.roi_align(x, rois[found], (7, 5), scale, samples or -1, aligned)
        torch.testing.assert_close(actual[found].permute(0, 3, 1, 2), expected, rtol=1e-5, atol=1e-5)
    assert OPS.roi_align(maps, rois[:0], levels[:0], scales, [7, 5], samples, aligned).shape == (0, 7, 5, channels)


def convolution(**changes):
    arguments = dict(
        x=torch.randn(1, 5, 6, 20),
        threshold=torch.zeros(32),
        weight=torch.zeros(1, 9, 16, dtype=torch.int32),
        out_affine=torch.ones(2, 16),
        n=10,
        geometry=[3, 3, 1, 1, 1, 1, 1, 1],
        rprelu=torch.ones(3, 16),
        add=torch.ones(1, 5, 6, 10),
        factor=torch.ones(16),
    )
    return OPS.binary_conv2d(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(x=torch.randn(1, 5, 6)), "3 axes"),
        (dict(x=torch.randn(1, 20, 5, 6).permute(0, 2, 3, 1)), "not contiguous"),
        (dict(threshold=torch.zeros(20)), "threshold"),
        (dict(weight=torch.zeros(1, 8, 16, dtype=torch.int32)), "weight"),
        (dict(out_affine=torch.ones(2, 10)), "out_affine"),
        (dict(rprelu=torch.ones(3, 10)), "rprelu"),
        (dict(add=torch.ones(1, 4, 6, 10)), "add"),
        (dict(factor=None), "go together"),
        (dict(outputs=3), "go together"),
        (dict(outputs=3, predictor=torch.ones(10, 3), predictor_bias=torch.ones(16)), "predictor is"),
        (dict(n=0), "n=0"),
        (dict(geometry=[3, 3, 1, 1]), "geometry 4 numbers"),
        (dict(geometry=[3, 3, 0, 1, 1, 1, 1, 1]), "stride_height=0"),
        (dict(geometry=[3, 3, 1, 1, -1, 1, 1, 1]), "padding of 0 or more"),
        (dict(geometry=[3, 3, 1, 1, 1, 1, 2**20, 1]), "sizes up to"),
        (dict(geometry=[3, 3, 1, 1, 0, 0, 3, 1]), "too small"),
    ],
)
def test_convolutions_that_do_not_fit_are_refused(path, changes, message):
    assert convolution().shape == (1, 5, 6, 10)
    with pytest.raises(ValueError, match=message):
        convolution(**changes)


def test_a_predictor_follows_in_the_same_operator(path):
    layer = started(BinaryConv2d(40, 40, 3, padding=1, norm=True, act=True, shortcut=True), torch.randn(4, 40, 8, 8))
    heads, x = [nn.Conv2d(40, outputs, 1) for outputs in (3, 12, 35)], torch.randn(2, 40, 6, 17)
    packed = pack(layer)
    with torch.no_grad():
        for ours, head in zip(packed.predict(x, heads), heads, strict=True):
            torch.testing.assert_close(ours, head(packed(x)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [1, 14, 23])
def test_a_layer_with_a_shortcut_works_in_place(path, width):
    layer = started(BinaryConv2d(20, 20, 3, padding=1, norm=True, act=True, shortcut=True), torch.randn(4, 20, 8, 8))
    packed, x = pack(layer), torch.randn(2, 20, 9, width).contiguous(memory_format=torch.channels_last)
    expected = packed(x)
    assert packed.apply_(x) is x and torch.equal(x, expected)
    other = torch.randn(2, 20, 9, width + 1)  # not in channels-last memory: nothing to change
    before = other.clone()
    assert torch.equal(packed.apply_(other), packed(before)) and torch.equal(other, before)


@pytest.mark.parametrize("channels", [1, 16, 37])
@pytest.mark.parametrize("sizes", [((8, 6), (4, 3)), ((13, 25), (7, 13)), ((5, 5), (5, 5)), ((3, 4), (1, 1))])
def test_maps_are_enlarged_as_torch_does(path, channels, sizes):
    x, y = (torch.randn(2, *size, channels) for size in sizes)
    expected = x + F.interpolate(y.permute(0, 3, 1, 2), size=sizes[0]).permute(0, 2, 3, 1)
    OPS.upsample_add_(x, y)
    assert torch.equal(x, expected)


@pytest.mark.parametrize("number", [0, 1, 15, 16, 17, 400])
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 0.7, 1.0])
def test_nms_keeps_what_torchvision_keeps(path, number, threshold):
    boxes = torch.randint(0, 40, (number, 4)).float()
    boxes[:, 2:] += boxes[:, :2] - (torch.rand(number, 1) < 0.1).float()  # some empty
    scores = torch.randint(0, 50, (number,)).float()  # some equal
    assert torch.equal(OPS.nms(boxes, scores, threshold), torchvision.ops.nms(boxes, scores, threshold))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(rois=torch.tensor([[1.0, 0, 0, 9, 9]])), "rois are not all of an image of 1"),
        (dict(rois=torch.tensor([[-1.0, 0, 0, 9, 9]])), "rois are not all of an image of 1"),
        (dict(rois=torch.tensor([[0.0, 0, 0, torch.nan, 9]])), "within 1e"),
        (dict(rois=torch.tensor([[0.0, 0, 0, 1e9, 9]])), "within 1e"),
        (dict(levels=torch.tensor([1])), "levels are not all in 0 to 0"),
        (dict(levels=torch.tensor([0, 0])), "levels is"),
        (dict(rois=torch.zeros(1, 4)), "rois is"),
        (dict(maps=[]), "0 maps"),
        (dict(maps=[torch.randn(1, 4, 5)]), "3 axes"),
        (dict(samples=65), "samples=65"),
        (dict(size=[0, 7]), "height=0"),
    ],
)
def test_regions_that_do_not_fit_are_refused(changes, message):
    given = dict(maps=[torch.randn(1, 4, 5, 3)], rois=torch.tensor([[0.0, 0, 0, 9, 9]]), levels=torch.tensor([0]))
    given |= dict(scales=[1.0] * len(changes.get("maps", [0])), size=[7, 7], samples=0, aligned=True)
    assert OPS.roi_align(**given | dict(scales=[1.0])).shape == (1, 7, 7, 3)
    with pytest.raises(ValueError, match=message):
        OPS.roi_align(**(given | changes))


def test_other_operators_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="boxes is"):
        OPS.nms(torch.ones(3, 5), torch.ones(3), 0.5)
    with pytest.raises(ValueError, match="scores is"):
        OPS.nms(torch.ones(3, 4), torch.ones(2), 0.5)
    with pytest.raises(ValueError, match="y is"):
        OPS.upsample_add_(torch.ones(1, 4, 4, 3), torch.ones(1, 2, 2, 4))
    with pytest.raises(ValueError, match="add is"):  # stride 2
        layer = torch.zeros(16), torch.zeros(1, 9, 16, dtype=torch.int32), torch.ones(2, 16)
        OPS.binary_conv2d_(torch.ones(1, 4, 4, 16), *layer, [3, 3, 2, 2, 1, 1, 1, 1], None, torch.ones(16))


def test_threads_change_nothing_and_phases_are_measured():
    layer = BinaryConv2d(40, 40, 3, padding=1, norm=True, shortcut=True).eval()
    layer, x = pack(layer), torch.randn(2, 40, 30, 17)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = layer(x)
        torch.set_num_threads(3)
        with kernels.profile() as seconds:
            assert torch.equal(layer(x), expected)
    finally:
        torch.set_num_threads(threads)
    ran = {phase for phase, time in seconds.items() if time}
    assert ran == ({"pack", "convolution"} if kernels.active_path() != kernels.REFERENCE else set())


def test_packed_convolutions_compile_and_export():
    model = nn.Sequential(pack(BinaryConv2d(20, 20, 3, padding=1, shortcut=True, act=True).eval()))
    x = torch.randn(1, 20, 6, 7)
    exported = torch.export.export(model, (x,), dynamic_shapes=({2: torch.export.Dim("height", min=2)},))
    taller = torch.randn(1, 20, 9, 7)
    torch.testing.assert_close(exported.module()(taller), model(taller))
