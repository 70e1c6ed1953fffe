"""Packed files that want to do harm: nothing of them runs, and what they name is refused."""

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

from mmbivit.deploy import load
from mmbivit.deploy.header import read_header
from tests.packed_files import changed


@pytest.fixture
def marker(tmp_path, monkeypatch) -> Path:
    """A file that nothing may write; modules that would write it, if they were imported, can be found."""
    folder, path = tmp_path / "modules", tmp_path / "marker"
    (folder / "trap_scope").mkdir(parents=True)
    code = f"open({str(path)!r}, 'w')\ndef make(**_): pass\n"
    for name in ("trap.py", "trap_scope/registry.py", "trap_scope/__init__.py"):
        (folder / name).write_text(code)
    monkeypatch.syspath_prepend(folder)
    yield path
    for name in [name for name in sys.modules if name.startswith("trap")]:
        del sys.modules[name]


@pytest.mark.parametrize(
    "cfg",
    [
        dict(type="os.system", command="touch MARKER"),
        dict(type="trap.make"),
        dict(type="trap"),
        dict(type="trap_scope.Any"),
        dict(type="Linear", in_features=1, out_features=1, _scope_="trap_scope"),
    ],
)
def test_registries_do_run_what_such_files_name(marker, cfg):
    """The attacks below are real: without our checks each of these runs code."""
    cfg = {key: value.replace("MARKER", str(marker)) if isinstance(value, str) else value for key, value in cfg.items()}
    try:
        with DefaultScope.overwrite_default_scope("mmdet"):
            MODELS.build(Config(cfg))
    except Exception:  # after the deed
        pass
    assert marker.exists()


ATTACKS = [
    ("type", "os.system"),
    ("type", "trap"),
    ("type", "mmdet.os.system"),
    ("type", "mmcv.ops"),
    ("type", "FPN"),
    ("type", "torch.hub.load"),
    ("type", ["os.system"]),
    ("type", None),
    ("type", "Detectron2Wrapper"),
    ("type", "LAD"),
    ("type", "KnowledgeDistillationSingleStageDetector"),
    ("type", "GLIP"),
    ("type", "SoftTeacher"),
    ("neck", dict(type="os.system", command="touch MARKER")),
    ("neck", dict(type="subprocess.Popen", args=["touch", "MARKER"])),
    ("neck", dict(type="builtins.exec", object="open('MARKER', 'w')")),
    ("neck", dict(type="trap.make")),
    ("neck", dict(type="trap_scope.Any")),
    ("neck", dict(type="mmengine.trap")),
    ("neck", [dict(type="FPN"), dict(type="trap.make")]),
    ("neck", dict(type="FPN", in_channels=[8], out_channels=8, num_outs=1, _scope_="trap_scope")),
    ("neck._scope_", "trap_scope"),
    ("neck._delete_", True),
    ("neck.init_cfg", dict(type="Pretrained", checkpoint="https://unreachable.invalid/x.pth")),
    ("neck.upsample_cfg", dict(mode="trap")),
    ("neck.conv_cfg", dict(type="trap")),
    ("neck.norm_cfg", dict(type="BN", layer=dict(type="trap.make"))),
    ("neck.in_channels", ["MARKER"]),
    ("neck.num_outs", float(10**7)),
    ("init_cfg", dict(type="Pretrained", checkpoint="MARKER")),
    ("pretrained", "torchvision"),
    ("custom_imports", dict(imports=["trap"])),
    ("backbone", dict(type="trap.make")),
    ("teacher_ckpt", "weights"),
    ("teacher_config", "config"),
    ("language_model", dict(type="BertModel", name="bert")),
    ("rpn_head.type", "ATSSVLFusionHead"),
    ("rpn_head.anchor_generator.type", "trap"),
    ("rpn_head.anchor_generator.type", "Linear"),
    ("rpn_head.bbox_coder", dict(type="AppearanceFreeLink", checkpoint="MARKER")),
    ("rpn_head.bbox_coder", dict(type="CameraMotionCompensation", warp_mode="MARKER")),
    ("roi_head.bbox_roi_extractor.roi_layer.type", "nms"),
    ("roi_head.shared_head", dict(type="mmdet.ResNet", depth=50)),
    ("roi_head.bbox_head", dict(type="BertModel", name="bert")),
    ("test_cfg.rcnn.nms.type", "__import__('os').system('touch MARKER')"),
    ("test_cfg.rpn.nms.type", "eval"),
    ("data_preprocessor.batch_augments", [dict(type="trap.make")]),
    ("data_preprocessor.file_name", "x"),
]


@pytest.mark.parametrize(("place", "value"), ATTACKS, ids=[f"{place}-{i}" for i, (place, _) in enumerate(ATTACKS)])
def test_nothing_of_a_detector_file_runs(detector_file, marker, tmp_path, place, value):
    value = json.loads(json.dumps(value).replace("MARKER", str(marker)))
    model = copy.deepcopy(read_header(detector_file).model)
    *parents, last = place.split(".")
    node = model
    for name in parents:
        node = node[name]
    node[last] = value
    file = changed(detector_file, tmp_path, model=model)
    with pytest.raises(ValueError, match=r"changed.safetensors is (not loaded: |damaged, )") as caught:
        load(file)
    assert "\n" not in str(caught.value)
    assert not marker.exists()
    assert not any(name.startswith("trap") for name in sys.modules)


@pytest.mark.parametrize(
    "entry",
    [
        dict(model=dict(__tuple__=[dict(type="trap.make")])),
        dict(pipeline=[dict(__tuple__=[dict(type="trap.make")])]),
        dict(pipeline=[dict(type="os.system", command="MARKER")]),
        dict(pipeline=[dict(type="LoadImageFromFile", backend_args=dict(backend="http"))]),
        dict(pipeline=[dict(type="LoadImageFromFile", imdecode_backend="trap")]),
        dict(pipeline=[dict(type="LoadImageFromFile", _scope_="trap_scope")]),
        dict(pipeline=[dict(type="Albu", transforms=[dict(type="trap.make")])]),
        dict(pipeline=[dict(type="Resize", scale=[10**6, 10**6])]),
        dict(pipeline=[dict(type="Pad", pad_val=dict(type="FPN"))]),
        dict(pipeline=[dict(type="mmbivit.TimmTransform")]),
        dict(pipeline=["Resize"]),
        dict(dataset_meta=dict(classes="person")),
        dict(dataset_meta=dict(classes=[1])),
        dict(dataset_meta=dict(classes=[])),
        dict(dataset_meta=dict(classes=["\x1b[2Jgone"])),
        dict(dataset_meta=dict(classes=["person"], palette=[[1, 2]])),
        dict(dataset_meta=dict(classes=["person"], palette=[[1, 2, 300]])),
        dict(dataset_meta=dict(classes=["person"], palette=[[1, 2, 3]] * 2)),
        dict(dataset_meta=dict(classes=["person"], classes_file="MARKER")),
    ],
)
def test_nothing_of_transforms_and_names_runs(detector_file, marker, tmp_path, entry):
    entry = json.loads(json.dumps(entry).replace("MARKER", str(marker)))
    with pytest.raises(ValueError, match="changed.safetensors is not loaded: "):
        load(changed(detector_file, tmp_path, **entry))
    assert not marker.exists()
    assert not any(name.startswith("trap") for name in sys.modules)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(type="os.system"), "has to have num_classes, topk, mean and std only"),
        (dict(init_cfg=dict(type="Pretrained", checkpoint="x")), "has to have num_classes"),
        (dict(data_preprocessor=dict(type="trap.make", mean=[0], std=[1])), "has to have num_classes"),
        (dict(data_preprocessor=dict(mean=["x"], std=[1])), "has to be numbers"),
        (dict(data_preprocessor=dict(mean=1, std=[1])), "has to be numbers"),
        (dict(data_preprocessor=dict(mean=[0.5], std=[0])), "its classifier cannot be built"),
        (dict(topk="5"), "has to be numbers"),
        (dict(topk=0), "its classifier cannot be built, .*topk=0"),
        (dict(num_classes=10**6), "has 3 names and 0 colours; expected as many as num_classes=1000000"),
    ],
)
def test_nothing_of_a_classifier_file_runs(classifier_file, marker, tmp_path, change, message):
    model = read_header(classifier_file).model | change
    with pytest.raises(ValueError, match=message):
        load(changed(classifier_file, tmp_path, model=model))
    assert not marker.exists()


def test_heads_of_other_sizes_are_refused_before_they_are_built(detector_file, classifier_file, tmp_path):
    model = copy.deepcopy(read_header(detector_file).model)
    model["roi_head"]["bbox_head"]["fc_out_channels"] = 10**6  # would be 4 TB
    with pytest.raises(ValueError, match=r"'roi_head.bbox_head.*' is F32 .*, expected F32 \[.*1000000"):
        load(changed(detector_file, tmp_path, model=model))
    model = copy.deepcopy(read_header(detector_file).model)
    model["roi_head"]["mask_head"]["num_convs"] = 10**6
    with pytest.raises(ValueError, match="describes more layers than it has tensors for"):
        load(changed(detector_file, tmp_path, model=model))
    tensors = {"head.weight": torch.zeros(3, 17)}
    with pytest.raises(ValueError, match=r"'head.weight' is F32 \[3, 17\], expected F32 \[3, 16\]"):
        load(changed(classifier_file, tmp_path, tensors))
    with pytest.raises(ValueError, match="lacks .* tensors, first 'head.bias'"):
        classifier = read_header(classifier_file)
        entries = dict(kind="classifier", model=classifier.model, dataset_meta=classifier.dataset_meta, pipeline=[])
        load(changed(detector_file, tmp_path, **entries))
