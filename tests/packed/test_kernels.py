"""The operators on every code path against independent references: integers exactly, floats closely."""

import copy
import ctypes
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mmbivit.binary import BinaryLinear, ResidualBinaryLinear, RPReLU
from mmbivit.deploy import pack
from mmbivit.deploy.packers import pack_linear, pack_residual_linear
from mmbivit.packed import PackedDualBranchMLP, PackedResidualMLP, PackedWindowAttention, kernels, operators
from mmbivit.packed.packing import pack_signs, pack_weight, pad_channels, unpack_signs
from tests.deploy.networks import binary_swin, randomise

OPS = torch.ops.mmbivit
ROOT = Path(__file__).parents[2]
WIDTHS = (1, 31, 32, 33, 63, 64, 65, 96, 127, 128, 129, 288, 384, 1152, 3072)


@pytest.fixture(params=kernels.available_paths())
def path(request):
    with kernels.use_path(request.param):
        yield request.param


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def random_signs(*shape):
    return torch.rand(shape) < 0.5


def plus_minus(signs):
    return signs.long() * 2 - 1


@pytest.mark.parametrize("width", [*WIDTHS, 5440, 12544, 16320, 16321])  # a few rows of the long ones
def test_accumulators_are_exact(path, width):
    for rows, outputs in ((1, 1), (7, 17), (57, 49), (0, 5), (113, 33), (3, 200), (2, 350)):
        if width > 4000 and rows > 50:
            continue
        a, w = random_signs(rows, width), random_signs(outputs, width)
        a[:1], w[:1] = True, False  # all bits differ
        a[-1:], w[-1:] = False, True
        expected = plus_minus(a).float() @ plus_minus(w).float().T  # whole numbers below 2^24
        actual = OPS.binary_matmul(pack_signs(a), pack_weight(w), width, outputs)
        assert actual.dtype == torch.int32 and torch.equal(actual.float(), expected)


@pytest.mark.parametrize("width", WIDTHS)
def test_signs_are_packed_exactly(path, width):
    x = torch.randn(59, width)
    x[0], x[1] = 0.0, -0.0
    gain, shift = torch.randint(-2, 3, (2, width)).float()  # exact, ties and zero gains included
    affine = torch.stack([pad_channels(gain), pad_channels(shift, -1.0)])
    expected = x.double() * gain + shift >= 0
    actual = OPS.pack_affine(x, affine)
    assert torch.equal(unpack_signs(actual, width), expected)
    assert torch.equal(actual, pack_signs(expected))  # padding included


@pytest.mark.parametrize("width", [1, 33, 96])
@pytest.mark.parametrize("outputs", [1, 16, 50])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_equals_the_simulated_layers(path, width, outputs, bias):
    norm, norm_after = randomise(nn.BatchNorm1d(width)), randomise(nn.BatchNorm1d(outputs))
    layer, act = randomise(BinaryLinear(width, outputs, bias=bias)), randomise(RPReLU(outputs))
    x, add = torch.randn(61, width), torch.randn(61, outputs)
    # 2e-5: the simulated product sums rounded floats, ours is one integer
    close = dict(rtol=2e-5, atol=2e-5)
    with torch.no_grad():
        torch.testing.assert_close(pack_linear(layer)(x), layer(x), **close)
        packed = pack_linear(layer, norm, norm_after, act)
        expected = act(norm_after(layer(norm(x))))
        torch.testing.assert_close(packed(x), expected, **close)
        torch.testing.assert_close(packed(x, add), expected + add, **close)
        torch.testing.assert_close(pack_linear(layer, norm)(x, add), layer(norm(x)) + add, **close)
        assert packed(x[:0]).shape == (0, outputs)
        torch.testing.assert_close(packed(x.view(61, 1, width)), expected[:, None], **close)


def test_linear_refuses_stage_1_and_other_activations():
    layer = BinaryLinear(8, 4)
    with pytest.raises(ValueError, match="act is GELU"):
        pack_linear(layer, act=nn.GELU())
    layer.binarize_weight = False
    with pytest.raises(ValueError, match="32-bit weights and 1-bit inputs, which belong to an earlier training stage"):
        pack_linear(layer)


@pytest.mark.parametrize(("size", "patch", "outputs"), [((9, 14), 4, 8), ((16, 16), 4, 96), ((5, 3), 2, 50)])
def test_patch_embedding_equals_a_padded_convolution(path, size, patch, outputs):
    conv = nn.Conv2d(3, outputs, patch, stride=patch)
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        expected = conv(F.pad(images, (0, -size[1] % patch, 0, -size[0] % patch))).flatten(2).transpose(1, 2)
        weight, bias = pad_channels(conv.weight.flatten(1).T).contiguous(), pad_channels(conv.bias)
    actual = OPS.patch_embedding(images, weight, bias, patch, outputs)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("height", "width", "channels"), [(1, 1, 1), (7, 9, 40), (16, 8, 96)])
def test_feature_map(path, height, width, channels):
    x, affine = torch.randn(2, height * width, channels), torch.randn(2, channels)
    expected = (x * affine[0] + affine[1]).transpose(1, 2).view(2, channels, height, width)
    actual = OPS.feature_map(x, pad_channels(affine), height, width)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def linear_arguments():
    return [
        torch.randn(5, 40),
        pad_channels(torch.randn(2, 40)),
        pack_weight(random_signs(20, 40)),
        pad_channels(torch.randn(2, 20)),
        20,
        pad_channels(torch.randn(3, 20)),
        torch.randn(5, 20),
    ]


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.randn(5, 40).double(), "x is torch.float64"),
        (0, torch.randn(40, 5).T, "x is not contiguous"),
        (0, torch.randn(5, 30), "in_affine is torch.float32 .2, 48.; expected torch.float32 .2, 32."),
        (1, torch.randn(2, 40), "in_affine is"),
        (2, torch.zeros(2, 2, 16), "weight is torch.float32"),
        (2, torch.zeros(1, 2, 16, dtype=torch.int32), "weight is"),
        (3, torch.randn(2, 20), "out_affine is"),
        (5, torch.randn(2, 32), "rprelu is"),
        (6, torch.randn(4, 20), "add is"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(path, place, value, message):
    arguments = linear_arguments()
    OPS.binary_linear(*arguments)
    arguments[place] = value
    with pytest.raises(ValueError, match=message):
        OPS.binary_linear(*arguments)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ([4, 4, 7, 3], "layout has 4 numbers; expected 5, or 6"),
        ([4, 5, 7, 3, 1], "x has 16 tokens; layout says 4 x 5"),
        ([-4, -4, 7, 3, 1], "layout says -4 x -4"),
        ([4, 4, 7, 7, 1], "window 7 x 7 and shift 7; expected 0 <= shift < window"),
        ([4, 4, 7, -1, 1], "shift -1"),
        ([4, 4, 0, 0, 1], "window 0"),
        ([4, 4, 129, 0, 1], "window 129"),
        ([4, 4, 8, 0, 1], "expected torch.float32"),
        ([4, 4, 7, 3, 1, 8], "window 7 x 8 and shift 3; expected 0 where it is not square"),
    ],
)
def test_layouts_that_do_not_fit_are_refused(path, layout, message):
    block = pack(binary_swin()).stages[0].blocks[0]
    for layer in (block.attn, block.mlp):
        layer(torch.randn(1, 16, 8), [4, 4, 7, 3, 1])
        with pytest.raises(ValueError, match=message):
            layer(torch.randn(1, 16, 8), layout)


def test_a_branch_that_does_not_fit_is_refused(path):
    mlp = pack(binary_swin()).stages[0].blocks[0].mlp
    x, layout = torch.randn(1, 16, 8), [4, 4, 7, 3, 1]
    arguments = [mlp.in_affine, mlp.fc1_weight, mlp.fc1_thresholds, mlp.fc2_weight, mlp.fc2_affine, mlp.hidden_dims]
    si = [mlp.get_buffer(name) for name in mlp.SI_NAMES]
    OPS.dual_branch_mlp_(x, *arguments, si, mlp.si_hidden, layout)
    for branch, hidden in ((si[:-1], 49), (si, 0), (si, 20_000), ([*si[:2], si[2][:, :1], *si[3:]], 49)):
        with pytest.raises(ValueError, match="si "):
            OPS.dual_branch_mlp_(x, *arguments, branch, hidden, layout)


@pytest.mark.parametrize(
    ("channels", "side", "hw", "hidden", "wide"),
    [
        (20, 11, (23, 9), 130, 24),
        (40, 36, (40, 37), 1000, 24),
        (16, 7, (9, 20), 70, 24),
        (208, 7, (14, 21), 49, 424),
        (96, 5, (11, 10), 25, 40),
        (80, 5, (5, 5), 25, 24),  # fewer windows than threads
    ],
)
def test_windows_are_mixed_as_by_the_reference(path, channels, side, hw, hidden, wide, three_threads):
    tokens = side**2
    layer = PackedDualBranchMLP(channels, wide, tokens, hidden)
    limits = [pad_channels(values) for values in (torch.randint(channels, (wide,)), torch.full((wide,), channels))]
    limits[1][wide:] = -1  # never set
    layer.fill(
        in_affine=pad_channels(torch.randn(2, channels)),
        fc1_weight=pack_weight(random_signs(wide, channels)),
        fc1_thresholds=torch.stack(limits),
        fc2_weight=pack_weight(random_signs(channels, wide)),
        fc2_affine=pad_channels(torch.randn(2, channels)),
        si_affine=pad_channels(torch.randn(2, channels)),
        si_gamma=torch.randn(tokens),
        si_weight1=pack_signs(random_signs(hidden, tokens)),
        # the range of counts in which a bit is 0
        si_thresholds1=torch.stack([torch.randint(tokens // 3, tokens // 2, (hidden,)), torch.full((hidden,), tokens)]),
        si_weight2=pack_signs(random_signs(tokens, hidden)),
        si_affine2=torch.randn(2, tokens),
        si_alpha=pad_channels(torch.randn(channels)),
    )
    x, layout = torch.randn(2, hw[0] * hw[1], channels), [*hw, side, 0, 0]
    actual, expected = x.clone(), x.clone()
    layer(actual, layout)
    with kernels.use_path("reference"):
        layer(expected, layout)
    assert (expected - x).abs().mean() > 1
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("channels", "heads"), [(96, 3), (48, 3), (60, 3), (280, 7), (24, 2), (128, 2)])
@pytest.mark.parametrize("window", [7, 8])
def test_heads_equal_the_reference(path, channels, heads, window):
    arch = dict(embed_dims=channels, depths=(2,), num_heads=(heads,))
    for block in pack(binary_swin(arch=arch, out_indices=(0,), window_size=window)).stages[0].blocks:
        x, layout = torch.randn(2, 15 * 20, channels), [15, 20, window, 3, 1]
        actual, expected = x.clone(), x.clone()
        block.attn(actual, layout)
        with kernels.use_path("reference"):
            block.attn(expected, layout)
        assert (expected - x).abs().mean() > 0.1
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("patch", "n"), [(0, 9), (-2, 9), (2, 0), (2, -16)])
def test_impossible_sizes_are_refused(path, patch, n):
    with pytest.raises(ValueError, match="allowed: 1 or more"):
        OPS.patch_embedding(torch.randn(1, 3, 4, 4), torch.randn(12, 16), torch.randn(16), patch, n)


def test_an_argument_that_is_not_in_the_cpus_memory_is_refused():
    affine = torch.randn(2, 48, device="meta")
    with pytest.raises(ValueError, match="first argument is on the CPU and another one is not"):
        OPS.pack_affine(torch.randn(5, 40), affine)
    if kernels.active_path() != "reference":
        with pytest.raises(ValueError, match="first argument is on the CPU and another one is not"):
            operators.pack_affine(torch.randn(5, 40), affine)


def test_heads_and_selections_that_the_kernels_do_not_know_are_refused(path):
    for recipe in ("sibivit", "reactnet"):
        attn = pack(binary_swin(recipe=recipe)).stages[0].blocks[0].attn
        for name, value, message in (
            ("head_dim", 1000, "head_dim=1000; allowed: up to 992"),
            ("limit", torch.zeros(2), "limit is"),
            ("selection", "best", "selection='best'; allowed: below_best, above, share"),
        ):
            broken = copy.deepcopy(attn)
            if name == "selection":
                broken._selection = lambda broken=broken: ("best", broken.step, broken.limit)
            else:
                setattr(broken, name, value)
            with pytest.raises(ValueError, match=message):
                broken(torch.randn(1, 16, 8), [4, 4, 7, 3, 1])


@pytest.mark.parametrize(("width", "outputs"), [(1, 4), (33, 99), (96, 96), (96, 48), (60, 12), (40, 30)])
def test_linear_with_a_shortcut_equals_the_simulated_layers(path, width, outputs):
    norm = randomise(nn.BatchNorm1d(width))
    layer = randomise(ResidualBinaryLinear(width, outputs, bias=width == 33))
    x = torch.randn(61, width)
    with torch.no_grad():
        torch.testing.assert_close(pack_residual_linear(layer)(x), layer(x), rtol=2e-5, atol=2e-5)
        packed, expected = pack_residual_linear(layer, norm), layer(norm(x))
        torch.testing.assert_close(packed(x), expected, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(packed(x.view(61, 1, width)), expected[:, None], rtol=2e-5, atol=2e-5)
        assert packed(x[:0]).shape == (0, outputs)


def test_layers_with_shortcuts_that_do_not_fit_are_refused(path):
    layer = pack_residual_linear(randomise(ResidualBinaryLinear(40, 20)))
    x, tensors = torch.randn(5, 40), layer._layer("layer")
    for change, message in (
        (tensors[:2], "layer has 2 tensors"),
        ([tensors[0][:40], *tensors[1:]], "layer threshold is"),
        ([tensors[0], tensors[1][:1], tensors[2]], "layer weight is"),
        ([*tensors[:2], tensors[2][:3]], "layer out is"),
    ):
        with pytest.raises(ValueError, match=message):
            OPS.residual_linear(x, layer.in_affine, change, 20)
    mlp = pack(binary_swin(recipe="reactnet")).stages[0].blocks[0].mlp
    layers = mlp._layer("fc1"), mlp._layer("fc2")
    si = [mlp.si_affine, *mlp._layer("si1"), *mlp._layer("si2"), mlp.si_alpha]
    for branch, hidden in ((si[:-1], 49), (si, 0), (si, 20_000), ([*si[:2], si[2][:, :1], *si[3:]], 49)):
        with pytest.raises(ValueError, match="si "):
            OPS.residual_mlp_(torch.randn(1, 16, 8), mlp.in_affine, *layers, 24, branch, hidden, [4, 4, 7, 3, 1])
    attn = pack(binary_swin(recipe="reactnet")).stages[0].blocks[0].attn
    attn.head_dim = 4
    with pytest.raises(ValueError, match="1 heads of head_dim=4; expected 8 channels in all"):
        attn(torch.randn(1, 16, 8), [4, 4, 7, 3, 1])


@pytest.mark.parametrize(
    ("channels", "side", "hw", "hidden"), [(20, 11, (23, 9), 242), (40, 36, (40, 37), 648), (16, 7, (9, 20), 70)]
)
def test_windows_of_many_tokens_are_mixed_with_shortcuts_as_by_the_reference(path, channels, side, hw, hidden):
    tokens = side**2
    layer = PackedResidualMLP(channels, 2 * channels, tokens, hidden)
    layer.fill(
        **{name: torch.randn(tensor.shape) for name, tensor in layer.named_buffers() if "weight" not in name},
        fc1_weight=pack_weight(random_signs(2 * channels, channels)),
        fc2_weight=pack_weight(random_signs(channels, 2 * channels)),
        si1_weight=pack_signs(random_signs(hidden, tokens)),
        si2_weight=pack_signs(random_signs(tokens, hidden)),
    )
    x, layout = torch.randn(2, hw[0] * hw[1], channels), [*hw, side, 0, 0]
    actual, expected = x.clone(), x.clone()
    layer(actual, layout)
    with kernels.use_path("reference"):
        layer(expected, layout)
    assert (expected - x).abs().mean() > 1
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-3)


def test_nan_parameters_show(path):
    layer, act = randomise(BinaryLinear(40, 20)), randomise(RPReLU(20))
    packed = pack_linear(layer, act=act)
    packed.out_affine[0, 3] = torch.nan
    out = packed(torch.randn(9, 40))
    assert out[:, 3].isnan().all() and out.isnan().sum() == 9


def test_operators_work_with_compile_and_export(path):
    arguments = linear_arguments()
    torch.library.opcheck(OPS.binary_linear.default, tuple(arguments))
    torch.library.opcheck(OPS.pack_affine.default, tuple(arguments[:2]))
    torch.library.opcheck(OPS.binary_matmul.default, (pack_signs(random_signs(3, 40)), arguments[2], 40, 20))
    torch.library.opcheck(OPS.feature_map.default, (torch.randn(2, 6, 16), torch.randn(2, 16), 2, 3))
    embedding = (torch.randn(1, 3, 5, 6), torch.randn(12, 16), torch.randn(16), 2, 9)
    torch.library.opcheck(OPS.patch_embedding.default, embedding)
    merging = (
        torch.randn(1, 6, 8),
        torch.randn(2, 32),
        pack_weight(random_signs(16, 32)),
        torch.randn(2, 16),
        3,
        2,
        16,
    )
    torch.library.opcheck(OPS.patch_merging.default, merging)
    layer = pack_residual_linear(randomise(ResidualBinaryLinear(40, 20)))
    arguments = torch.randn(5, 40), layer.in_affine, layer._layer("layer"), 20
    torch.library.opcheck(OPS.residual_linear.default, arguments)


def test_keys_are_selected_by_their_softmax(path):
    """As NumPy computes it, in windows of few and many tokens, with scores far apart and close together."""
    for window, spread in ((3, 1.0), (7, 1.0), (7, 30.0), (9, 0.01), (12, 4.0)):
        attn = PackedWindowAttention(32, 1, window, scale=0.2, selection="share", divide=False)
        tokens = window**2
        attn.fill(
            in_affine=torch.stack([torch.ones(32), torch.zeros(32)]),
            padding=torch.zeros(1, dtype=torch.int32),
            qkv_weight=pack_weight(torch.eye(32, dtype=torch.bool).repeat(3, 1)),
            qkv_thresholds=torch.stack([torch.full((96,), 16), torch.full((96,), 32)]),
            relative_position_bias_table=spread * torch.randn((2 * window - 1) ** 2, 1),
            share=torch.tensor([0.6 / tokens]).log(),
            value_ratio=torch.full((32,), 0.5),
            value_offset=torch.zeros(32),
            proj_weight=pack_weight(torch.eye(32, dtype=torch.bool)),
            proj_affine=torch.stack([torch.ones(32), torch.zeros(32)]),
        )
        x = torch.randn(1, tokens, 32)
        signs = np.where(x[0].numpy() >= 0, 1.0, -1.0)
        # a row of the identity as signs: 1 in its own channel, -1 elsewhere
        products = 2 * signs - signs.sum(1, keepdims=True)
        values = np.where(products > 0, 1.0, -1.0)
        scores = 0.2 * values @ values.T + attn.position_bias[0, :, :tokens].double().numpy()
        chances = np.exp(scores - scores.max(1, keepdims=True))
        chances /= chances.sum(1, keepdims=True)
        out = np.where((chances >= 0.6 / tokens) @ values >= 0, 1.0, -1.0)
        expected = x[0].double().numpy() + 2 * out - out.sum(1, keepdims=True)
        attn(x, [window, window, window, 0, 1])
        np.testing.assert_allclose(x[0].numpy(), expected, rtol=1e-5, atol=1e-5)


def test_number_of_threads_changes_nothing():
    x, layer = torch.randn(500, 96), pack_linear(randomise(BinaryLinear(96, 70)))
    before = torch.get_num_threads()
    try:
        outputs = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            outputs.append(layer(x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


def test_paths_are_forced_and_restored():
    before = kernels.active_path()
    assert kernels.available_paths()[-1] == "reference" and before == kernels.available_paths()[0]
    with kernels.use_path("reference"):
        assert kernels.active_path() == "reference"
    assert kernels.active_path() == before
    with (
        pytest.raises(ValueError, match="code path 'sse9' does not run here; available: .*reference"),
        kernels.use_path("sse9"),
    ):
        pass


def test_profile_counts_the_phases_that_ran(path):
    layer = pack_linear(BinaryLinear(64, 64))
    with kernels.profile() as times:
        layer(torch.randn(2000, 64))
    assert set(times) == set(kernels.PHASES)
    ran = {phase for phase, seconds in times.items() if seconds > 0}
    assert ran == (set() if path == "reference" else {"pack", "linear"})


def run_python(code: str, **environment) -> str:
    environment = os.environ | environment
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout


def test_variable_chooses_the_path_of_a_process():
    code = "from mmbivit.packed import kernels; print(kernels.active_path())"
    name = kernels.available_paths()[-2:][0]
    assert run_python(code, MMBIVIT_KERNELS=name).strip() == name


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks")
def test_forked_process_computes_what_its_parent_does():
    code = """
import os, signal, torch
from mmbivit.deploy import pack
from tests.deploy.networks import binary_swin
torch.set_num_threads(2)
packed, images = pack(binary_swin(window_size=4)), torch.randn(2, 3, 64, 64)
expected = packed(images)
if (child := os.fork()) == 0:
    signal.alarm(20)  # ends it, if it waits for threads of its parent
    os._exit(7 if all(map(torch.equal, packed(images), expected)) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert run_python(code, OMP_NUM_THREADS="2").strip() == "7"


def test_deploy_needs_torch_alone():
    code = (
        "import sys; from mmbivit.deploy import PackedSwinTransformer, load; "
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'mmdet', 'mmengine', 'mmcv', 'timm'}))"
    )
    assert run_python(code).strip() == "[]"


@pytest.mark.skipif(kernels.KERNELS.library is None, reason="needs the native kernels")
def test_an_extension_of_another_version_is_not_used(monkeypatch):
    """Its functions would read arguments at other places."""
    assert kernels.Kernels().paths
    longer = type("MlpArgs", (kernels.MlpArgs,), {"_fields_": [("new", ctypes.c_int64)]})
    monkeypatch.setattr(kernels, "ARGS", (*kernels.ARGS[:5], longer, *kernels.ARGS[6:]))
    with pytest.warns(UserWarning, match="is of another version of mmbivit"):
        assert kernels.Kernels().paths == {}


def test_without_the_extension_one_warning_says_how_to_get_it(monkeypatch):
    expected = pack_linear(layer := randomise(BinaryLinear(40, 20)))(x := torch.randn(3, 40))
    monkeypatch.setattr(kernels.Kernels, "_load", staticmethod(lambda: None))
    monkeypatch.setattr(kernels, "KERNELS", kernels.Kernels())
    assert kernels.available_paths() == ("reference",)
    with pytest.warns(UserWarning, match="native kernels are not built.*With a C.. compiler") as caught:
        actual = pack_linear(layer)(x)
    assert len(caught) == 1
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pack_linear(layer)(x)
