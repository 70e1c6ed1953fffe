"""Packed networks against the simulated ones: integers equal, outputs within 1e-4, differences only at ties."""

import copy

import pytest
import torch
from mmdet.registry import MODELS as MMDET_MODELS
from torch import nn

from mmbivit.apis import load_config
from mmbivit.binary import BinaryLinear
from mmbivit.deploy import PackedSwinTransformer, pack
from mmbivit.deploy.folding import fold_linear
from mmbivit.deploy.packers import pack_linear
from mmbivit.models import BinarySwinTransformer, ImageClassifier
from mmbivit.packed import kernels
from mmbivit.packed.arguments import read_layout
from mmbivit.packed.packing import pack_signs, pack_weight
from mmbivit.packed.reference import window_tokens
from tests.deploy.networks import binary_swin, randomise

ALL_PATHS = kernels.available_paths()
WIDE_ARCH = dict(embed_dims=40, depths=(2, 1), num_heads=(2, 5))
SMALL_ARCH = dict(embed_dims=8, depths=(1, 1), num_heads=(1, 2))


def assert_equal_outputs(network, images, tolerance=1e-4):
    """Compare all code paths with the simulated network; 1e-4 of the largest value."""
    with torch.no_grad():
        expected = network(images)
    packed = pack(network)
    for path in ALL_PATHS:
        with kernels.use_path(path):
            outputs = packed(images)
        for actual, simulated in zip(outputs, expected, strict=True):
            assert actual.shape == simulated.shape and actual.is_contiguous(memory_format=torch.channels_last)
            assert (actual - simulated).abs().max() <= tolerance * simulated.abs().max(), path


@pytest.mark.parametrize("size", [(64, 64), (37, 45), (28, 120), (5, 3), (112, 60)], ids=str)
def test_outputs_equal_at_any_size(size):
    assert_equal_outputs(binary_swin(), torch.randn(2, 3, *size))


@pytest.mark.parametrize(
    "options",
    [
        dict(spatial_interaction=None, mlp_ratio=4),
        dict(spatial_interaction=dict(ratio=2.0)),
        dict(spatial_interaction=dict(ratio=0.5)),
        dict(spatial_interaction=dict(ratio=1.0, axis="grid"), pretrain_img_size=48),
        dict(spatial_interaction=dict(ratio=2.0, axis="grid"), pretrain_img_size=32, window_size=3),
        dict(window_size=4),
        dict(window_size=9),
        dict(arch=dict(embed_dims=96, depths=(2, 1), num_heads=(3, 6))),
        dict(arch=dict(embed_dims=30, depths=(2, 1), num_heads=(2, 5)), mlp_ratio=1.5),
        dict(arch=dict(embed_dims=40, depths=(2, 1), num_heads=(1, 1))),
        dict(qkv_bias=False, qk_scale=0.3, out_indices=(1,)),
        dict(patch_norm=False, patch_size=2, in_channels=4),
        dict(use_abs_pos_embed=True, pretrain_img_size=32),
        dict(shift_single_window=False),
        dict(mask_padding=False),
        dict(downsample="float"),
        dict(recipe=dict(act="gelu")),
        dict(recipe=dict(norm="ln")),
        dict(recipe=dict(norm="ln"), patch_norm=False, downsample="float"),
        dict(recipe=dict(norm="ln"), downsample="float", spatial_interaction=None),
        dict(recipe=dict(norm="ln"), spatial_interaction=dict(ratio=1.0, axis="grid"), pretrain_img_size=48),
        dict(recipe="bivit"),
        dict(recipe="bivit", spatial_interaction=None, mlp_ratio=4, downsample="float"),
        dict(recipe="bireal"),
        dict(recipe="bibert"),
        dict(recipe="bit"),
        dict(recipe="bit", spatial_interaction=None, mlp_ratio=4, arch=WIDE_ARCH),
        dict(recipe=dict(base="bi-vit", threshold="channel")),  # without thresholds, sums of 0 are ties
        dict(recipe=dict(base="bi-vit", threshold="channel"), arch=WIDE_ARCH),
        dict(recipe="reactnet"),
        dict(recipe="reactnet", spatial_interaction=None, mlp_ratio=4, arch=WIDE_ARCH),
        dict(recipe="reactnet", spatial_interaction=dict(ratio=2.0), downsample="float"),
        dict(recipe="reactnet", spatial_interaction=dict(ratio=0.5), mask_padding=False),
        dict(recipe="reactnet", spatial_interaction=dict(ratio=1.0, axis="grid"), pretrain_img_size=48),
        dict(recipe="reactnet", arch=dict(embed_dims=30, depths=(2, 1), num_heads=(2, 5)), mlp_ratio=1.5),
        dict(recipe="reactnet", window_size=9, patch_norm=False),
        dict(recipe=dict(base="reactnet", norm="ln")),
        dict(recipe=dict(base="reactnet", head_shortcut=False, attention="softmax_threshold")),
        dict(recipe=dict(base="reactnet", activations="scaled", sign_ste="clip", attention="elastic_heads")),
        dict(recipe=dict(attention="softmax_select")),
        dict(recipe=dict(attention="score_positive")),
        dict(recipe=dict(attention="elastic", activations="scaled")),
        dict(recipe=dict(activations="elastic", places=dict(heads=dict(activations="sign")))),
        dict(recipe=dict(weight_scale="learned")),
        dict(recipe=dict(threshold="none", weight_center="none", weight_scale="tensor")),
        dict(recipe=dict(weight_center="tensor", sign_ste="poly", weight_ste="plain")),
        dict(drop_rate=0.2, attn_drop_rate=0.2, drop_path_rate=0.5, with_cp=True),
    ],
    ids=lambda options: ", ".join(f"{key}={value}" for key, value in options.items()),
)
def test_outputs_equal_with_every_option(options):
    assert_equal_outputs(binary_swin(**options), torch.randn(1, options.get("in_channels", 3), 50, 42))


def test_four_stages_as_in_the_detectors():
    network = binary_swin(
        arch=dict(embed_dims=16, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8)), out_indices=(0, 1, 2, 3)
    )
    assert_equal_outputs(network, torch.randn(1, 3, 100, 140))


def test_integer_accumulators_of_all_layers_equal():
    network = binary_swin()
    inputs = {}
    for name, layer in network.named_modules():
        if isinstance(layer, BinaryLinear):
            layer.register_forward_hook(lambda layer, args, out, name=name: inputs.update({name: (args[0], out)}))
    with torch.no_grad():
        network(torch.randn(1, 3, 56, 56))
    assert len(inputs) == 3 * 6 + 1
    for name, (x, out) in inputs.items():
        layer = network.get_submodule(name)
        signs, scale, bias = fold_linear(layer)
        simulated = ((out.double() - bias) / scale).flatten(0, -2)
        assert (simulated - simulated.round()).abs().max() < 1e-2, name  # integers, but for rounding
        bits = pack_signs(layer.input_quantizer(x).flatten(0, -2) > 0)
        for path in ALL_PATHS:
            with kernels.use_path(path):
                actual = torch.ops.mmbivit.binary_matmul(
                    bits, pack_weight(signs), layer.in_features, layer.out_features
                )
            assert torch.equal(actual.long(), simulated.round().long()), (name, path)


def test_a_tie_explains_differences():
    # Without biases and thresholds, hidden accumulators of 0 meet thresholds of 0. Simulated float32 sums of +-theta
    # miss the 0 by rounding; in float64 sums of a float32 theta are exact, like our integers.
    torch.manual_seed(3)
    network = BinarySwinTransformer(dict(embed_dims=96, depths=(1,), num_heads=(3,)), mlp_ratio=3, out_indices=(0,))
    mlp, tokens, layout = network.eval().stages[0].blocks[0].mlp, torch.randn(1, 28 * 28, 96), [28, 28, 7, 0, 1]
    for layer in (mlp.fc1, mlp.fc2):
        layer.weight.data = torch.where(layer.weight < 0, -0.1, 0.1)
    simulated_units = []
    mlp.fc2.input_quantizer.register_forward_hook(lambda module, args, out: simulated_units.append((args[0], out)))
    for path in ALL_PATHS:
        ours = tokens.clone()
        with kernels.use_path(path):
            pack(network).stages[0].blocks[0].mlp(ours, layout)
        with torch.no_grad():
            simulated = tokens + mlp.float()(tokens, None)
            exact = (tokens.double() + mlp.double()(tokens.double(), None)).float()
        differing = ((ours - simulated).abs() > 1e-4 * simulated.abs().max()).float().mean()
        assert differing > 0.01, path  # a token follows the bits that flipped
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-4)
        (simulated_values, simulated_bits), (exact_values, exact_bits) = simulated_units[-2:]
        flipped = simulated_bits != exact_bits
        assert flipped.any() and not exact_values[flipped].any()  # all at exactly 0
        assert simulated_values[flipped].abs().max() < 1e-6
        mlp.float()


@pytest.mark.slow
@pytest.mark.parametrize("size", [224, 200])
def test_blocks_of_swin_t_differ_only_where_rounding_flips_bits(size):
    # Each block gets the simulated network's own input, so differences cannot pile up. Windows that differ all the same
    # are such in which the simulation itself changes when its input changes by 1e-6.
    network = binary_swin(arch="tiny", out_indices=(3,))
    packed, calls = pack(network), []
    for block in (block for stage in network.stages for block in stage.blocks):
        block.register_forward_hook(lambda block, args, out: calls.append((block, *args, out)))
    with torch.no_grad():
        network(torch.randn(1, 3, size, size))
        for block in network.modules():
            getattr(block, "_forward_hooks", {}).clear()
        packed_blocks = [block for stage in packed.stages for block in stage.blocks]
        windows = differing = 0
        for (block, tokens, hw_shape, out), packed_block in zip(calls, packed_blocks, strict=True):
            x, layout = tokens.clone(), [*hw_shape, 7, packed_block.shift, 1]
            packed_block.attn(x, layout)
            packed_block.mlp(x, layout)
            index = window_tokens(read_layout(layout))[0]

            def differ(a, b, index=index):
                tokens = ((a - b).abs() > 1e-4 * b.abs().max()).any(dim=2)[0]
                return (tokens[index.clamp(min=0)] & (index >= 0)).any(dim=1)

            found = differ(x, out)
            windows, differing = windows + len(found), differing + int(found.sum())
            unstable = torch.zeros_like(found)
            for _ in range(20 if found.any() else 0):
                nudged = block(tokens * (1 + 1e-6 * torch.randn_like(tokens)), hw_shape)
                unstable |= differ(nudged, out)
            assert not (found & ~unstable).any()
    assert differing <= 0.02 * windows


def test_classifier_and_detector_keep_their_float_parts(configs):
    torch.manual_seed(0)
    backbone = dict(type="mmbivit.BinarySwinTransformer", arch=SMALL_ARCH, out_indices=(1,))
    classifier = ImageClassifier(backbone=backbone, num_classes=3)
    randomise(classifier.backbone)
    before = copy.deepcopy(classifier.state_dict())
    packed = pack(classifier)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(packed(images), classifier.eval()(images), rtol=1e-4, atol=1e-4)
    assert isinstance(packed.backbone, PackedSwinTransformer) and isinstance(classifier.backbone, BinarySwinTransformer)
    assert not packed.training and packed.head.weight is not classifier.head.weight
    for name, tensor in classifier.state_dict().items():
        assert torch.equal(tensor, before[name])

    detector = MMDET_MODELS.build(load_config(configs["binary"]).model)
    packed = pack(detector)
    assert isinstance(packed.backbone, PackedSwinTransformer)
    assert torch.equal(packed.rpn_head.rpn_cls.weight, detector.rpn_head.rpn_cls.weight)


def test_config_rebuilds_the_network():
    packed = pack(binary_swin())
    twin = PackedSwinTransformer(**packed.options)
    twin.load_state_dict(packed.state_dict(), strict=True)
    images = torch.randn(1, 3, 40, 40)
    for one, other in zip(packed(images), twin(images), strict=True):
        assert torch.equal(one, other)
    assert not list(packed.parameters())
    registered = MMDET_MODELS.build(dict(type="mmbivit.PackedSwinTransformer", **packed.options))
    registered.load_state_dict(packed.state_dict(), strict=True)
    assert packed.num_features == [8, 16] and packed.out_indices == (0, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(embed_dims=0), "embed_dims"),
        (dict(num_heads=[3, 2]), r"num_heads\[0\]=3 does not divide 8"),
        (dict(depths=[2]), "one entry for each"),
        (dict(window_size=32), "up to 31"),
        (dict(out_indices=[2]), "allowed: 0 to 1"),
        (dict(out_indices=[1, 0]), "rising"),
        (dict(scales=[float("nan"), 1.0]), "numbers up to 1e5"),
        (dict(scales=[1e38, 1.0]), "numbers up to 1e5"),
        (dict(embed_dims=1024, num_heads=[1, 4]), "a head has 1024 channels; allowed: 992"),
        (dict(select_ratio=0), "in .0, 1."),
        (dict(pos_embed_shape=[3]), "height and width"),
        (dict(mask_padding=1), "True or False"),
        (dict(selection="best"), "selection='best' is unknown; allowed: 'ratio', 'positive', 'nonnegative', 'share'"),
        (dict(head_shortcut=True), "head_shortcut=True is of residual networks"),
        (dict(si_hidden=[49]), "si_hidden=.*; expected an entry for each of 2 stages"),
        (dict(si_sides=[7, 7, 7]), "si_sides=.*; expected an entry for each of 2 stages"),
        (dict(si_sides=[7, 200]), "up to 31, 128"),
        (dict(hidden_dims=["8", "8"]), "hidden_dims"),
    ],
)
def test_impossible_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        PackedSwinTransformer(**(pack(binary_swin()).options | change))


def test_stage_1_is_refused():
    network = binary_swin()
    network.set_stage(1)
    with pytest.raises(ValueError, match="BinarySwinTransformer is in training stage 1; train on to stage 2"):
        pack(network)


@pytest.mark.parametrize(
    ("recipe", "name"),
    [
        (dict(linear="float", downsample="binary"), r"stages.0.blocks.0.attn.qkv is Linear"),
        (dict(qkv="float"), r"stages.0.blocks.0.attn.qkv_quantizer is Identity"),
        (dict(attention="softmax"), r"stages.0.blocks.0.attn.attention is Softmax"),
        (dict(activations="elastic"), r"stages.0.blocks.0.attn.qkv_quantizer is ElasticBinary; only signs"),
        (dict(head_shortcut=True), r"stages.0.blocks.0.attn.head_shortcut can be packed with recipe.layer_shortcut"),
        (dict(base="reactnet", act="rprelu"), r"stages.0.blocks.0.mlp.act is RPReLU; only Identity"),
        (
            dict(base="reactnet", places=dict(fc1=dict(layer_shortcut=False))),
            r"stages.0.blocks.0.mlp.fc1 is BinaryLinear; only ResidualBinaryLinear",
        ),
        ("float", "BinarySwinTransformer has no binary layer"),
    ],
)
def test_float_parts_are_refused_by_name(recipe, name):
    with pytest.raises(ValueError, match=name):
        network = BinarySwinTransformer(SMALL_ARCH, recipe=recipe, out_indices=(0, 1))
        pack(randomise(network))


def test_attention_that_differs_between_blocks_is_refused():
    network = binary_swin()
    network.stages[0].blocks[1].attn.attention.ratio = 0.5
    with pytest.raises(
        ValueError, match=r"stages.0.blocks.1.attn.attention selects keys by .*0.5.*, but stages.0.blocks.0"
    ):
        pack(network)


def test_layer_norms_of_another_kind_are_refused_by_name():
    network = binary_swin(recipe=dict(norm="ln"))
    network.stages[0].blocks[0].mlp.norm.eps = 1e-6
    with pytest.raises(ValueError, match="stages.0.blocks.0.mlp.norm LayerNorm.*expected LayerNorm with eps=1e-05"):
        pack(network)
    with pytest.raises(ValueError, match="LayerNorm cannot be folded; expected BatchNorm"):
        pack_linear(BinaryLinear(4, 3), norm=nn.LayerNorm(4))


def test_unknown_modules_are_refused_by_name():
    network = binary_swin()
    network.stages[1].blocks[0].mlp.act = nn.Sequential(nn.ReLU())
    with pytest.raises(ValueError, match="stages.1.blocks.0.mlp.act is Sequential, which pack.. does not know"):
        pack(network)
    network = binary_swin()
    network.stages[1].blocks[0].mlp.act = nn.Softmax(dim=-1)
    with pytest.raises(ValueError, match="stages.1.blocks.0.mlp.fc1 activation function Softmax is unknown"):
        pack(network)
    with pytest.raises(ValueError, match="Linear, which has no packer: pack.. takes .*BinarySwinTransformer"):
        pack(nn.Linear(3, 3))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 3, 8, 8, dtype=torch.float64), "images are torch.float64"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "images are torch.uint8"),
        (torch.zeros(1, 4, 8, 8), r"expected \(B, 3, H, W\)"),
        (torch.zeros(3, 8, 8), r"expected \(B, 3, H, W\)"),
        (torch.zeros(1, 3, 0, 8), r"expected \(B, 3, H, W\)"),
    ],
)
def test_wrong_images_are_refused(images, message):
    packed = pack(binary_swin())
    with pytest.raises(ValueError, match=message):
        packed(images)


def test_non_contiguous_and_empty_images():
    packed = pack(binary_swin())
    images = torch.randn(2, 40, 36, 3).permute(0, 3, 1, 2)
    for actual, expected in zip(packed(images), packed(images.contiguous()), strict=True):
        assert torch.equal(actual, expected)
    for path in ALL_PATHS:
        with kernels.use_path(path):
            assert [out.shape for out in packed(torch.zeros(0, 3, 32, 32))] == [(0, 8, 8, 8), (0, 16, 4, 4)]


def test_batches_and_threads_change_nothing():
    packed, images = pack(binary_swin()), torch.randn(3, 3, 60, 44)
    whole = packed(images)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single = [packed(image[None]) for image in images]
    finally:
        torch.set_num_threads(before)
    for level, out in enumerate(whole):
        assert torch.equal(out, torch.cat([outs[level] for outs in single]))


def test_gradients_are_not_recorded():
    outs = pack(binary_swin())(torch.randn(1, 3, 32, 32, requires_grad=True))
    assert not any(out.requires_grad for out in outs)


@pytest.mark.parametrize("recipe", ["sibivit", "reactnet"])
def test_compile_and_export_take_the_packed_network(recipe):
    packed, images = pack(binary_swin(recipe=recipe)), torch.randn(1, 3, 44, 40)
    expected = packed(images)
    exported = torch.export.export(packed, (images,)).module()
    compiled = torch.compile(packed, backend="aot_eager", fullgraph=True)
    for outputs in (exported(images), compiled(images)):
        for actual, out in zip(outputs, expected, strict=True):
            torch.testing.assert_close(actual, out, rtol=1e-6, atol=1e-6)
    assert images.shape == (1, 3, 44, 40)
