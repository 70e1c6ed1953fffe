"""A packed file that loads also predicts: what of it fails on an image is named when it is loaded."""

import copy
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mmbivit.deploy import load
from mmbivit.deploy.header import read_header
from mmbivit.deploy.trial import _own_size, try_classifier, try_detector
from tests.packed_files import changed

REMOVED = object()


def put(node: Any, place: str, value: object) -> Any:
    """Return nested values with the one at a dotted place changed or removed."""
    root = node = copy.deepcopy(node)
    *parents, last = (int(key) if key.isdigit() else key for key in place.split("."))
    for key in parents:
        node = node[key]
    if value is REMOVED:
        del node[last]
    else:
        node[last] = value
    return root


def refuse(file: Path, folder: Path, message: str, **metadata: object) -> None:
    with pytest.raises(ValueError, match=f"changed.safetensors.*{message}") as caught:
        load(changed(file, folder, **metadata))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("data_preprocessor", REMOVED, "its 'model' fails on a tiny image"),
        ("data_preprocessor.mean", [1.0, 2.0], "its detector cannot be built, as its 'model' is"),
        ("neck.num_outs", 8, r"its 'model\.rpn_head' fails"),
        ("rpn_head.bbox_coder.target_means", [0.0, 0.0], r"its 'model\.rpn_head' fails"),
        ("roi_head.bbox_roi_extractor.roi_layer.output_size", 5, r"its 'model\.roi_head\.bbox_head\.shared_fcs\.0' fa"),
        ("roi_head.mask_roi_extractor.finest_scale", "x", r"its 'model\.roi_head\.mask_roi_extractor' fails"),
        ("test_cfg.rpn", None, "'model"),
        ("test_cfg.rpn.max_per_img", REMOVED, "'model.rpn_head' .*max_per_img"),
        ("test_cfg.rcnn.score_thr", "x", "'model.roi_head"),
        ("test_cfg.rcnn.max_per_img", 0.5, "'model.roi_head"),
        # Of these a detector only learns when it has found something.
        ("test_cfg.rcnn.nms.iou_threshold", REMOVED, "'model.roi_head.*iou_threshold"),
        ("test_cfg.rcnn.mask_thr_binary", REMOVED, "'model.roi_head.*mask_thr_binary"),
        ("test_cfg.rcnn.mask_thr_binary", "", "'model.roi_head"),
    ],
)
def test_models_that_do_not_run_are_named(detector_file, tmp_path, place, value, message):
    model = put(read_header(detector_file).model, "test_cfg.rcnn.score_thr", 0.999)
    load(changed(detector_file, tmp_path, model=model))
    refuse(detector_file, tmp_path, message, model=put(model, place, value))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("data_preprocessor.pad_size_divisor", 16384),
        ("neck.num_outs", 10**6),
        ("roi_head.bbox_roi_extractor.featmap_strides", [1e-6, 8]),
        ("roi_head.mask_roi_extractor.roi_layer.sampling_ratio", 10**6),
        ("roi_head.mask_roi_extractor.roi_layer.output_size", 10**6),
    ],
)
def test_settings_that_take_any_time_or_memory_are_out_of_range(detector_file, tmp_path, place, value):
    model = put(read_header(detector_file).model, place, value)
    refuse(detector_file, tmp_path, rf"model\.{place}=.* out of range", model=model)


def test_counts_without_bounds_cost_nothing(detector_file, tmp_path):
    model = read_header(detector_file).model
    for name in ("rpn.nms_pre", "rpn.max_per_img", "rcnn.max_per_img"):
        model = put(model, f"test_cfg.{name}", 10**6)
    loaded = load(changed(detector_file, tmp_path, model=model))
    assert loaded.roi_head.test_cfg.max_per_img == 10**6


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("0.x", True, r"its 'pipeline\[0\]' fails on a tiny image"),
        ("0.color_type", "x", r"its 'pipeline\[0\]' fails"),
        ("0.color_type", "grayscale", "its 'pipeline' fails"),
        ("0", REMOVED, r"its 'pipeline\[0\]' fails"),
        ("1.scale", REMOVED, r"its 'pipeline\[1\]' fails"),
        ("1.scale", {"__tuple__": [64, "x"]}, r"its 'pipeline\[1\]' fails"),
        ("1.scale_factor", 1000, "Resize.scale_factor=1000 is out of range"),
        ("1", dict(type="CenterCrop", crop_size=-1), r"its 'pipeline\[1\]' fails"),
        ("2.meta_keys", "img_shape", "its 'pipeline' fails .*KeyError: 'img_shape'"),
        ("2", REMOVED, "its 'pipeline' fails .*KeyError: 'inputs'"),
    ],
)
def test_transforms_of_a_detector_that_do_not_run_are_named(detector_file, tmp_path, place, value, message):
    pipeline = put(read_header(detector_file).pipeline, place, value)
    refuse(detector_file, tmp_path, message, pipeline=pipeline)


def test_files_without_transforms_are_tried_too(detector_file, tmp_path):
    model = read_header(detector_file).model
    load(changed(detector_file, tmp_path, pipeline=[]))
    message = r"its 'model\.roi_head.*score_thr"
    refuse(detector_file, tmp_path, message, pipeline=[], model=put(model, "test_cfg.rcnn.score_thr", REMOVED))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (dict(pipeline=[dict(type="mmbivit.TimmTransform", input_siz=32)]), r"its 'pipeline\[0\]' fails .*input_siz"),
        (dict(pipeline=[dict(type="mmbivit.TimmTransform", input_size=-1)]), r"its 'pipeline\[0\]' fails"),
        (dict(pipeline=[dict(type="mmbivit.TimmTransform", crop_pct=1e-6)]), "crop_pct=1e-06 is out of range"),
    ],
)
def test_classifiers_that_do_not_run_are_named(classifier_file, tmp_path, entry, message):
    refuse(classifier_file, tmp_path, message, **entry)


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        (dict(pos_embed_shape=(14, 12), patch_size=16), [(224, 192)]),
        (dict(pos_embed_shape=None, patch_size=4), []),
        (dict(patch_size=4), []),
        (dict(pos_embed_shape=(4, 4)), []),  # a network of others, which calls it something else
        (dict(pos_embed_shape=(65, 64), patch_size=1), []),  # too many tokens
        (dict(pos_embed_shape=(4, 4), patch_size=1000), []),  # too many pixels
    ],
)
def test_a_size_that_a_file_asks_for_is_tried_where_it_is_small(options, sizes):
    assert _own_size(SimpleNamespace(config=SimpleNamespace(**options))) == sizes


def test_missing_names_are_noticed_without_the_number_of_classes(detector_file):
    header = read_header(detector_file)
    loaded = load(detector_file)
    loaded.roi_head.bbox_head.num_classes = 2  # as where a config leaves it out
    with pytest.raises(ValueError, match=r"'dataset_meta' has 1 names, but model.roi_head.bbox_head detects 2"):
        try_detector(loaded, header)


def test_building_names_the_field(detector_file, tmp_path):
    header = read_header(detector_file)
    message = "its detector cannot be built, as its '{}' is damaged"
    refuse(detector_file, tmp_path, message.format("architecture"), architecture=header.architecture | dict(scales=[]))
    refuse(detector_file, tmp_path, message.format("model"), model=put(header.model, "neck.in_channels", 8))


@pytest.mark.parametrize("kind", ["detector", "classifier"])
def test_trial_changes_nothing(detector_file, classifier_file, kind):
    file, trial = dict(detector=(detector_file, try_detector), classifier=(classifier_file, try_classifier))[kind]
    model, header = load(file), read_header(file)
    state, settings = copy.deepcopy(model.state_dict()), copy.deepcopy(getattr(model, "test_cfg", None))
    threads, generators = torch.get_num_threads(), (random.getstate(), torch.get_rng_state(), np.random.get_state())
    trial(model, header)
    assert random.getstate() == generators[0]
    assert torch.equal(torch.get_rng_state(), generators[1])
    np.testing.assert_equal(np.random.get_state(), generators[2])
    assert torch.get_num_threads() == threads
    assert not any(module.training for module in model.modules())
    assert getattr(model, "test_cfg", None) == settings
    assert state.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name])


def test_thresholds_come_back_after_an_error(detector_file):
    model, header = load(detector_file), read_header(detector_file)
    del model.roi_head.test_cfg.mask_thr_binary
    settings = copy.deepcopy(model.roi_head.test_cfg)
    with pytest.raises(ValueError, match="mask_thr_binary"):
        try_detector(model, header)
    assert model.roi_head.test_cfg == settings


def test_detectors_may_need_more_than_a_tiny_image(detector_file, monkeypatch):
    model, header, sides = load(detector_file), read_header(detector_file), []

    def extract_feat(images):
        sides.append(images.shape[-1])
        assert images.shape[-1] >= 256
        return type(model).extract_feat(model, images)

    monkeypatch.setattr(model, "extract_feat", extract_feat)
    try_detector(model, header)
    assert sides == [64, 256, 256]
