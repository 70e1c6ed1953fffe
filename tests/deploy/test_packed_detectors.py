"""Detectors with binary necks and heads, packed: what they compute, and that their files hold it."""

import copy
import json
import mmap
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from mmbivit import get_config
from mmbivit.deploy import load, pack, save
from mmbivit.deploy.around import packed_layers
from mmbivit.packed import PackedConv2d, PackedConvTranspose2d, PackedMapLinear, PackedScaledLinear
from tests.models.test_detection_parts import DETECTORS, FULL, box_head, build, losses_of
from tests.packed_files import changed
from tests.test_detectors import sample

EVERYTHING = dict(
    neck=dict(laterals=True),
    rpn_head=dict(predictor=True),
    bbox_head=dict(hidden=True, predictor=True),
    mask_head=dict(predictor=True, upsample=True),
)


def trained(cfg):
    """A detector whose statistics, and what starts from the first batch, are those of images."""
    model = build(cfg.model)
    losses_of(model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def config_of(name):
    if name != "everything":
        return get_config(name)
    cfg = get_config(FULL)
    cfg.model.neck.binary, cfg.model.rpn_head.binary = EVERYTHING["neck"], EVERYTHING["rpn_head"]
    cfg.model.roi_head.bbox_head.binary = EVERYTHING["bbox_head"]
    cfg.model.roi_head.mask_head.binary = EVERYTHING["mask_head"]
    return cfg


@pytest.fixture(scope="module", params=[*DETECTORS, "everything"])
def detectors(request):
    cfg = config_of(request.param)
    model = trained(cfg)
    return cfg, model, pack(model)


def close(actual, expected):
    """Compare lists of tensors; a sign that hangs on the order of a sum would be far off."""
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_parts_compute_what_the_simulated_ones_do(detectors):
    _, model, packed = detectors
    images = torch.randn(1, 3, 96, 128, generator=torch.Generator().manual_seed(2))
    maps = model.backbone(images)
    features = model.neck(maps)
    close(packed.neck(maps), features)
    two_stages = hasattr(model, "rpn_head")
    head = "rpn_head" if two_stages else "bbox_head"
    for ours, theirs in zip(getattr(packed, head)(features), getattr(model, head)(features), strict=True):
        close(ours, theirs)
    if not two_stages:
        return
    rois = torch.tensor([[0.0, 3, 5, 60, 70], [0, 20, 20, 90, 40], [0, 0, 0, 128, 96]])
    for kind in ("bbox", "mask"):
        extractors, heads = (getattr(model.roi_head, f"{kind}_{part}") for part in ("roi_extractor", "head"))
        ours = (getattr(packed.roi_head, f"{kind}_{part}") for part in ("roi_extractor", "head"))
        several = isinstance(heads, torch.nn.ModuleList)
        groups = (extractors, heads, *ours)
        for extractor, head, own_extractor, own_head in zip(*groups, strict=True) if several else [groups]:
            regions, own_regions = extractor(features, rois), own_extractor(features, rois)
            close([own_regions], [regions])
            outputs, own = head(regions), own_head(own_regions)
            close(own, outputs) if kind == "bbox" else close([own], [outputs])


@torch.no_grad()
@pytest.mark.parametrize("levels", [[(24, 32), (12, 16), (6, 8)], [(25, 13), (13, 7), (7, 4)]])
def test_float_parts_by_native_kernels_equal_mmdets(levels):
    from mmbivit.models.detection import native

    maps = [torch.randn(2, 4 * 2**i, *size) for i, size in enumerate(levels)]
    options = dict(in_channels=[4, 8, 16], out_channels=12, num_outs=5)
    for changes in ({}, dict(start_level=1), dict(add_extra_convs="on_output"), dict(norm_cfg=dict(type="BN"))):
        fpn = build(dict(type="mmdet.FPN", **options, **changes)).eval()
        expected = fpn(maps)
        native.use_native(own := torch.nn.ModuleList([fpn]))
        assert type(own[0]) is native.NativeFPN and type(fpn.lateral_convs[0].conv) is native.PointwiseConv2d
        close(own[0](maps), expected)
    for upsample in (dict(type="deconv", scale_factor=2), dict(type="nearest", scale_factor=2)):
        options = dict(in_channels=4, conv_out_channels=8, num_classes=3, num_convs=2, upsample_cfg=upsample)
        head, features = build(dict(type="mmdet.FCNMaskHead", **options)).eval(), torch.randn(19, 4, 5, 6)
        expected = [head(features), head(features[:0])]
        native.use_native(own := torch.nn.ModuleList([head]))
        close([own[0](features), own[0](features[:0])], expected)


@torch.no_grad()
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(0, 7), (5, 7), (300, 7), (2, 9, 20, 7)])
def test_linear_layers_equal_torchs(shape, threads):
    from mmbivit.models.detection import native

    layer, x, before = torch.nn.Linear(7, 11), torch.randn(shape), torch.get_num_threads()
    native.use_native(own := torch.nn.Sequential(copy.deepcopy(layer)))
    assert type(own[0]) is native.NativeLinear
    torch.set_num_threads(threads)
    try:
        torch.testing.assert_close(own(x), layer(x), rtol=1e-5, atol=1e-6)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("class_agnostic", [True, False])
def test_masks_are_pasted_as_mmdet_does(rescale, class_agnostic):
    from mmbivit.models.detection import native

    head = build(dict(type="mmdet.FCNMaskHead", num_classes=3, class_agnostic=class_agnostic, num_convs=1)).eval()
    corner = torch.rand(9, 2) * 50 - 5
    boxes = torch.cat([corner, corner + 40 * torch.rand(9, 2)], dim=1)
    boxes[0, 2:] = boxes[0, :2]
    logits, labels = torch.randn(9, 1 if class_agnostic else 3, 28, 28), torch.randint(0, 3, (9,))
    meta, cfg = dict(ori_shape=(50, 61), scale_factor=(1.3, 0.9)), Config(dict(mask_thr_binary=0.5))
    arguments = labels, meta, cfg, rescale
    expected = head._predict_by_feat_single(logits, first := boxes.clone(), *arguments)
    native.use_native(own := torch.nn.ModuleList([head]))
    actual = own[0]._predict_by_feat_single(logits, second := boxes.clone(), *arguments)
    assert torch.equal(actual, expected) and torch.equal(first, second) and expected.any()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read as Linux tells it")
def test_masks_take_up_memory_below_their_boxes_alone():
    from mmbivit.models.detection import native

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    head = build(dict(type="mmdet.FCNMaskHead", num_classes=1, num_convs=1)).eval()
    native.use_native(own := torch.nn.ModuleList([head]))
    boxes = torch.tensor([[100.0, 100.0, 140.0, 140.0]]).repeat(50, 1)
    arguments = torch.zeros(50, dtype=torch.long), dict(ori_shape=(2000, 2000), scale_factor=(1.0, 1.0))
    before = resident()
    masks = own[0]._predict_by_feat_single(
        torch.ones(50, 1, 28, 28), boxes, *arguments, Config(dict(mask_thr_binary=0.5))
    )
    taken = resident() - before
    assert masks.shape == (50, 2000, 2000) and masks.nbytes == 2e8
    assert taken < 2e7
    assert int(masks[7].sum()) == 40 * 40


def detect(model, size=(96, 128)):
    described = sample([])
    described.set_metainfo(dict(img_id=0, img_shape=size, ori_shape=size, scale_factor=(1.0, 1.0)))
    pixels = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))
    return model.test_step(dict(inputs=[pixels], data_samples=[described]))[0].pred_instances


def test_a_file_holds_the_packed_layers(detectors, tmp_path):
    cfg, model, packed = detectors
    names = packed_layers(packed)
    assert len(names) >= 7 and all(
        type(packed.get_submodule(name)).__module__.startswith("mmbivit.packed") for name in names
    )
    save(packed, tmp_path / "detector.safetensors", cfg)
    loaded = load(tmp_path / "detector.safetensors")
    assert packed_layers(loaded) == names
    ours, expected = detect(loaded), detect(packed)
    assert torch.equal(ours.bboxes, expected.bboxes) and torch.equal(ours.scores, expected.scores)
    simulated = detect(model)
    assert len(simulated) == len(expected)
    # On some CPUs a sum that meets its threshold rounds the other way, and what follows moves: scores by 0.002 on
    # average. A tenth more scale in one layer, or one wrong bit in eight of a block, is 0.01 or more.
    assert (expected.scores - simulated.scores).abs().mean() < 0.005
    bits = sum(packed.get_submodule(name).weight.nbytes for name in names)
    weights = sum(model.get_submodule(name).weight.nbytes for name in names)
    assert bits < weights / 16  # 1/32, but for padding of few channels


def test_layers_become_the_packed_layers_of_their_kind():
    packed = pack(trained(config_of("everything")))
    head, mask = packed.roi_head.bbox_head, packed.roi_head.mask_head
    assert type(packed.neck.lateral_convs[0].conv) is PackedConv2d and type(packed.rpn_head.rpn_conv) is PackedConv2d
    assert type(head.shared_fcs[0]) is PackedMapLinear and type(mask.upsample) is PackedConvTranspose2d
    head = box_head(num_shared_fcs=2, binary=dict(hidden=True))
    assert type(pack(head.shared_fcs[1].eval())) is PackedScaledLinear


def test_any_layer_by_conv_cfg_is_packed_and_what_is_unknown_stays(tmp_path):
    cfg = get_config("digits/mask_rcnn_sibivit")
    cfg.model.neck.conv_cfg = dict(type="mmbivit.BinaryConv2d")
    model = trained(cfg)
    packed = pack(model)
    assert {name.split(".")[0] for name in packed_layers(packed)} == {"neck"}
    assert type(packed.rpn_head.rpn_conv) is torch.nn.Conv2d
    save(packed, tmp_path / "detector.safetensors", cfg)
    assert torch.equal(detect(load(tmp_path / "detector.safetensors")).bboxes, detect(packed).bboxes)


def test_a_part_of_an_earlier_stage_is_refused():
    model = trained(get_config(FULL))
    model.neck.set_stage(1)
    with pytest.raises(ValueError, match=r"neck.fpn_convs.0.conv has 32-bit weights .* train on to the last"):
        pack(model)


@pytest.mark.parametrize(
    "layers",
    [
        ["neck.no_such"],
        ["neck"],
        ["roi_head.mask_head.upsample"],
        ["backbone.stages.0.blocks.0.attn"],
        [3],
        [["neck"]],
        ["x" * 1000],
    ],
)
def test_files_that_name_other_layers_are_refused(layers, tmp_path, small_file):
    file = changed(small_file, tmp_path, packed_layers=json.dumps(layers))
    with pytest.raises(ValueError, match="cannot be built|is no layer") as caught:
        load(file)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize("layers", ["{}", "3", '["a"', "null"])
def test_files_whose_layers_are_no_list_are_refused(layers, tmp_path, small_file):
    with pytest.raises(ValueError, match="packed_layers|does not fit"):
        load(changed(small_file, tmp_path, packed_layers=layers))


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    cfg = get_config(FULL)
    file = tmp_path_factory.mktemp("packed") / "detector.safetensors"
    save(pack(trained(cfg)), file, cfg)
    return file
