"""Packed detectors and classifiers: export, predictions and evaluation."""

import copy
import io
import json
import pickle
import re
import runpy
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import safetensors.torch
import torch
from mmengine.hub import get_config
from mmengine.registry import MODELS, DefaultScope
from rich.console import Console

import mmbivit
from mmbivit.apis import (
    UnusableImagesError,
    evaluate,
    evaluation_config,
    export_packed,
    export_table,
    load_config,
    predict,
)
from mmbivit.deploy import PackedSwinTransformer, load, pack, save
from mmbivit.deploy.header import PackedFile, read_header
from mmbivit.deploy.whole_models import describe_detector, detector_builder
from tests.apis.damaged_images import USABLE, check_problems, write_images
from tests.packed_files import content
from tests.tiny import CLASSES

TOOLS = Path(__file__).parents[2] / "tools" / "deployment"
ARCHITECTURE = dict(embed_dims=8, depths=[1], num_heads=[1], hidden_dims=[8], si_hidden=None, scales=[0.3])
ARCHITECTURE |= dict(out_indices=[0])


# Export


@pytest.mark.parametrize("kind", ["detector", "classifier"])
def test_export_reports_sizes_and_what_the_file_computes(
    kind, configs, classifier_configs, detector, classifier, tmp_path
):
    config = dict(detector=configs, classifier=classifier_configs)[kind]["binary"]
    model, checkpoint = dict(detector=detector, classifier=classifier)[kind]
    whole = export_packed(config, checkpoint, tmp_path / "whole.safetensors")
    part = export_packed(config, checkpoint, tmp_path / "part.safetensors", backbone_only=True)

    assert (whole.kind, part.kind) == (kind, "backbone")
    assert max(whole.difference, part.difference) < 1e-5  # float32 sums in another order
    state, packed = model.state_dict(), pack(model.backbone).state_dict()
    assert whole.float_bytes == sum(tensor.nbytes for tensor in state.values())
    assert whole.float_backbone_bytes == sum(tensor.nbytes for tensor in model.backbone.state_dict().values())
    packed_bytes = sum(tensor.nbytes for tensor in packed.values())
    assert whole.packed_backbone_bytes == part.packed_backbone_bytes == part.packed_bytes == packed_bytes
    assert whole.packed_bytes - packed_bytes == whole.float_bytes - whole.float_backbone_bytes
    for export, name in ((whole, "whole"), (part, "part")):
        size = (tmp_path / f"{name}.safetensors").stat().st_size
        assert export.file_bytes == size > export.packed_bytes

    rest = safetensors.torch.load_file(tmp_path / "whole.safetensors")
    for name, tensor in state.items():
        if not name.startswith("backbone."):
            assert torch.equal(rest[name], tensor)
    console = Console(width=100, file=io.StringIO())
    console.print(export_table(whole))
    text = console.file.getvalue()
    assert f"{whole.difference:.1e}" in text
    assert ("mask_head" in text) == (kind == "detector")


def test_backbone_only_file_is_the_backbone(configs, detector, tmp_path):
    export_packed(configs["binary"], detector[1], tmp_path / "part.safetensors", backbone_only=True)
    loaded = load(tmp_path / "part.safetensors")
    assert type(loaded) is PackedSwinTransformer
    inputs = torch.randn(1, 3, 40, 64)
    for a, b in zip(loaded(inputs), pack(detector[0]).backbone(inputs), strict=True):
        assert torch.equal(a, b)


def test_exports_that_cannot_be_are_named(
    configs, classifier_configs, detector, classifier, float_checkpoint, tmp_path
):
    out, (model, checkpoint) = tmp_path / "out.safetensors", detector

    def refuse(message, config=configs["binary"], file=checkpoint, error=ValueError, to=out, **options):
        with pytest.raises(error, match=message) as caught:
            export_packed(config, file, to, **options)
        assert "\n" not in str(caught.value)
        assert not out.exists()

    state = model.state_dict()
    torch.save(dict(state_dict=state | {"backbone.training_stage": torch.tensor(1)}), tmp_path / "stage1.pth")
    torch.save(dict(state_dict={k: v for k, v in state.items() if "mask_head" not in k}), tmp_path / "no_mask.pth")
    refuse("in training stage 1; train on to stage 2", file=tmp_path / "stage1.pth")
    refuse(r"tensors are missing in it, first roi_head.mask_head.*not a backbone", file=tmp_path / "no_mask.pth")
    refuse("is of a float network, the config's is binary", file=float_checkpoint)
    refuse("does not fit the config's model: ", file=classifier[1])
    refuse("does not fit the config's model: ", config=classifier_configs["binary"])
    refuse("has no binary layer", config=configs["float"], file=float_checkpoint)
    refuse(r"out.pth: .* ends in .safetensors", to=tmp_path / "out.pth")
    refuse("in.safetensors is packed already", file="in.safetensors")
    refuse("checkpoint no.pth does not exist", file="no.pth", error=FileNotFoundError)
    refuse("config no.py does not exist", config="no.py", error=FileNotFoundError)
    option = {"test_dataloader.dataset.pipeline": [dict(type="LoadImageFromFile"), dict(type="Albu", transforms=[])]}
    refuse("a transform of test images is 'Albu'; a packed detector may have LoadImage", cfg_options=option)
    refuse("model.test_cfg has the key 'teacher_url'", cfg_options={"model.test_cfg.teacher_url": 1})
    with pytest.raises(ValueError, match=r"a detector is saved with its config: save\(packed, path, config\)"):
        save(pack(model), out)


# What comes back


def test_packed_detector_comes_back_to_the_last_bit(configs, detector, detector_file, images, tmp_path):
    from mmdet.apis import inference_detector
    from mmdet.utils import register_all_modules

    register_all_modules()

    packed, loaded = pack(detector[0]), load(detector_file)
    assert not loaded.training
    assert loaded.dataset_meta == dict(classes=("person",), palette=[(220, 20, 60)])  # COCO's colour
    packed.cfg = load_config(configs["binary"])
    for image in images:
        before, after = (inference_detector(model, str(image)).pred_instances for model in (packed, loaded))
        assert len(before) >= 3
        for name in ("bboxes", "scores", "labels", "masks"):
            assert torch.equal(before[name], after[name])
    save(loaded, tmp_path / "again.safetensors", loaded.cfg)
    assert content(tmp_path / "again.safetensors") == content(detector_file)


def test_packed_classifier_comes_back_to_the_last_bit(classifier_configs, classifier, classifier_file, tmp_path):
    packed, loaded = pack(classifier[0]), load(classifier_file)
    pixels = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        before, after = (model.test_step(dict(inputs=pixels)) for model in (packed, loaded))
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a["pred_scores"], b["pred_scores"])
        assert torch.equal(a["pred_labels"], b["pred_labels"])
        assert a["pred_names"] == b["pred_names"]
    save(packed, tmp_path / "no_config.safetensors")
    assert load(tmp_path / "no_config.safetensors").cfg.test_dataloader is None
    save(packed, tmp_path / "again.safetensors", load_config(classifier_configs["binary"]))
    assert content(tmp_path / "again.safetensors") == content(classifier_file)


def test_file_says_what_it_holds(detector_file, classifier_file):
    detector, classifier = read_header(detector_file), read_header(classifier_file)
    assert (detector.kind, classifier.kind) == ("detector", "classifier")
    assert detector.model["type"] == "MaskRCNN"
    assert detector.model.keys().isdisjoint(("backbone", "train_cfg"))
    assert "init_cfg" not in json.dumps(detector.model)
    assert [transform["type"] for transform in detector.pipeline] == ["LoadImageFromFile", "Resize", "PackDetInputs"]
    assert classifier.model["num_classes"] == 3
    np.testing.assert_allclose(classifier.model["data_preprocessor"]["mean"], (0.485, 0.456, 0.406), rtol=1e-6)
    assert classifier.pipeline == [dict(type="mmbivit.TimmTransform", input_size=32)]
    assert classifier.dataset_meta == dict(classes=list(CLASSES))
    for header in (detector, classifier):
        assert header.mmbivit_version == mmbivit.__version__


@pytest.mark.parametrize(
    "name",
    [
        "mask_rcnn_sibivit_swin_t",
        "cascade_mask_rcnn_sibivit_swin_t",
        "retinanet_sibivit_swin_t",
        "digits/mask_rcnn_sibivit",
        "mmdet::atss/atss_r50_fpn_1x_coco.py",
        "mmdet::gfl/gfl_r50_fpn_1x_coco.py",
        "mmdet::rtmdet/rtmdet_s_8xb32-300e_coco.py",
        "mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py",
    ],
)
def test_detectors_of_the_configs_are_on_the_lists(name):
    cfg = get_config(name) if name.startswith("mmdet::") else mmbivit.get_config(name)
    described = json.loads(json.dumps(describe_detector(torch.nn.Module(), cfg)))
    header = PackedFile(
        Path("x"), "detector", "0", "PackedSwinTransformer", ARCHITECTURE, **described, packed_layers=[], tensors={}
    )
    with torch.device("meta"), DefaultScope.overwrite_default_scope("mmdet"):
        backbone = dict(ARCHITECTURE, type="mmbivit.PackedSwinTransformer")
        built = detector_builder(header, backbone)()
        cfg.model.backbone = backbone
        expected = MODELS.build(cfg.model)
    shapes = {key: value.shape for key, value in expected.state_dict().items()}
    assert {key: value.shape for key, value in built.state_dict().items()} == shapes
    assert len(shapes) > 50
    assert built.test_cfg == expected.test_cfg
    assert built.cfg.test_dataloader.dataset.pipeline[0].type == "LoadImageFromFile"


# Predictions


def test_packed_detector_draws_and_writes_what_the_simulated_one_detects(
    configs, detector, detector_file, images, tmp_path
):
    cv2.imwrite(str(tmp_path / "grey.jpg"), np.full((70, 50), 90, np.uint8))
    images = [*images, tmp_path / "grey.jpg"]
    simulated = predict(configs["binary"], detector[1], images, tmp_path / "simulated")
    written = predict(None, detector_file, images, tmp_path / "packed", score_thr=0.1, batch_size=2)
    assert [result["img_path"] for result in written] == list(map(str, images))
    for image, a, b in zip(images, simulated, written, strict=True):
        a, b = (json.loads(result["json_file"].read_text()) for result in (a, b))
        assert a["labels"] == b["labels"]
        np.testing.assert_allclose(a["scores"], b["scores"], atol=1e-4)  # float32 sums in another order
        np.testing.assert_allclose(a["bboxes"], b["bboxes"], atol=1e-2)
        assert len(b["masks"]) == len(b["scores"]) >= 1
        picture = cv2.imread(str(tmp_path / "packed" / "vis" / image.name))
        assert picture.shape == cv2.imread(str(image)).shape


def test_packed_classifier_gives_what_the_simulated_one_does(
    classifier_configs, classifier, classifier_file, image_folders, tmp_path
):
    folder = image_folders / "val" / "red"
    simulated = predict(classifier_configs["binary"], classifier[1], [folder])
    results = predict(None, classifier_file, [folder], tmp_path, batch_size=2)
    for a, b in zip(simulated, results, strict=True):
        assert (a["img_path"], a["labels"], a["names"]) == (b["img_path"], b["labels"], b["names"])
        np.testing.assert_allclose(a["scores"], b["scores"], rtol=1e-4)
        assert json.loads((tmp_path / "preds" / f"{Path(b['img_path']).stem}.json").read_text()) == b
    (best,) = predict(None, classifier_file, [folder / "red_0.png"], topk=1)
    assert best["labels"] == results[0]["labels"][:1]


def test_good_images_are_predicted_and_bad_ones_named(detector_file, classifier_file, tmp_path):
    folder, out = write_images(tmp_path / "images"), tmp_path / "out"
    for file in (detector_file, classifier_file):
        with pytest.raises(UnusableImagesError) as caught:
            predict(None, file, [folder], out, batch_size=2)
        assert [Path(result["img_path"]).name for result in caught.value.results] == list(USABLE)
        check_problems(caught.value.problems, folder)
        with pytest.raises(UnusableImagesError, match="a_first.png has 64 x 48 pixels, more than --max-pixels 99"):
            predict(None, file, [folder / USABLE[0]], out, max_pixels=99)


def test_bad_input_of_predictions_is_named(detector_file, classifier_file, classifier, images, tmp_path):
    def refuse(message, file, *args, error=ValueError, **options):
        with pytest.raises(error, match=message):
            predict(None, file, images, *args, **options)

    refuse("--out-dir DIR is needed", detector_file)
    refuse("--topk is for classifiers, and .* is of a detector", detector_file, tmp_path, topk=2)
    refuse("--score-thr is for detectors, and .* is of a classifier", classifier_file, score_thr=0.0)
    refuse("--device cuda|runs on the CPU", classifier_file, device="cuda:0")
    refuse("packed file no.safetensors does not exist", "no.safetensors", tmp_path, error=FileNotFoundError)
    save(pack(classifier[0]), tmp_path / "no_config.safetensors")
    refuse("has no transforms of test images; export it", tmp_path / "no_config.safetensors")
    save(pack(classifier[0].backbone), tmp_path / "backbone.safetensors")
    refuse("is of a backbone alone, which predicts nothing", tmp_path / "backbone.safetensors")


# Evaluation


@pytest.fixture
def tested(configs, classifier_configs, tmp_path):
    """Evaluate a checkpoint or a packed file on the tiny test data; returns metrics and predictions."""

    def run(checkpoint: Path, name: str = "detector", **options: object) -> tuple[dict, list]:
        cfg_options = {"experiment_name": f"{tmp_path.name}_{checkpoint.suffix}"} | options.pop("cfg_options", {})
        config = dict(detector=configs, classifier=classifier_configs)[name]["binary"]
        options = dict(work_dir=str(tmp_path / "work"), cfg_options=cfg_options) | options
        out = tmp_path / f"{checkpoint.stem}{checkpoint.suffix}.pkl"
        metrics = evaluate(evaluation_config(config, checkpoint, **options), out=out)
        return metrics, pickle.loads(out.read_bytes())

    return run


@pytest.fixture
def detected(coco, configs, detector, images, tmp_path) -> Path:
    """Annotations that a random detector gets right: what the simulated one detects, all but the best."""
    from mmdet.apis import inference_detector
    from mmdet.utils import register_all_modules

    register_all_modules()

    truth = json.loads((coco / "annotations" / "instances_val2017.json").read_text())
    model = copy.copy(detector[0])
    model.cfg = load_config(configs["binary"])
    truth["annotations"] = []
    for image, file in zip(truth["images"], images, strict=True):
        for x1, y1, x2, y2 in inference_detector(model, str(file)).pred_instances.bboxes[1:].tolist():
            box, corners = [x1, y1, x2 - x1, y2 - y1], [x1, y1, x2, y1, x2, y2, x1, y2]
            new = dict(id=len(truth["annotations"]) + 1, image_id=image["id"], category_id=1, iscrowd=0)
            truth["annotations"].append(new | dict(bbox=box, area=box[2] * box[3], segmentation=[corners]))
    (tmp_path / "detected.json").write_text(json.dumps(truth))
    return tmp_path / "detected.json"


def test_average_precision_is_that_of_the_simulated_detector(tested, detector, detector_file, detected):
    options = {"test_evaluator.ann_file": str(detected)}
    (simulated, before), (packed, after) = (tested(file, cfg_options=options) for file in (detector[1], detector_file))
    assert packed == simulated
    assert 0.4 < packed["coco/bbox_mAP"] < 1
    for a, b in zip(before, after, strict=True):
        np.testing.assert_allclose(a["pred_instances"]["scores"], b["pred_instances"]["scores"], atol=1e-4)
    # The model is the config's: its settings count.
    metrics, few = tested(detector_file, cfg_options={"model.test_cfg.rcnn.max_per_img": 1, "experiment_name": "few"})
    assert [len(prediction["pred_instances"]["scores"]) for prediction in few] == [1, 1]
    assert metrics.keys() == packed.keys()


def test_accuracy_is_that_of_the_simulated_classifier(tested, classifier, classifier_file):
    (simulated, before), (packed, after) = (tested(file, "classifier") for file in (classifier[1], classifier_file))
    assert packed == simulated
    for a, b in zip(before, after, strict=True):
        assert a["pred_names"] == b["pred_names"]
        np.testing.assert_allclose(a["pred_scores"], b["pred_scores"], rtol=1e-4)


def test_the_memory_of_an_image_is_kept_for_the_next_one(tested, classifier_file, images, tmp_path, monkeypatch):
    kept = []
    for name in ("predict", "evaluate"):
        module = sys.modules[f"mmbivit.apis.{name}"]  # in the package, the name is the function's
        monkeypatch.setattr(module, "keep_freed_memory", lambda name=name: kept.append(name))
    predict(None, classifier_file, images, tmp_path / "out")
    tested(classifier_file, "classifier")
    assert kept == ["predict", "evaluate"]


def test_evaluations_that_cannot_be_are_named(tested, detector_file, classifier_file, detector, tmp_path):
    def refuse(message, file=detector_file, name="detector", **options):
        with pytest.raises(ValueError, match=message) as caught:
            tested(file, name, **options)
        assert "\n" not in str(caught.value)

    save(pack(detector[0].backbone), tmp_path / "backbone.safetensors")
    refuse("is a packed backbone; expected a packed detector", tmp_path / "backbone.safetensors")
    refuse("is a packed backbone; expected a packed classifier", tmp_path / "backbone.safetensors", "classifier")
    refuse("is a packed classifier; expected a packed detector", classifier_file)
    options = {"model.roi_head.bbox_head.fc_out_channels": 5, "experiment_name": f"{tmp_path.name}_5"}
    refuse("does not fit the config's model: size mismatch for roi_head.bbox_head", cfg_options=options)
    refuse("--tta is for checkpoints of training", tta=True)
    refuse("--launcher slurm: .* is packed; use tools/dist_test.sh", launcher="slurm")
    refuse("--cfg-options model.backbone.mlp_ratio: ", cfg_options={"model.backbone.mlp_ratio": 4})
    with pytest.raises(FileNotFoundError, match=r"checkpoint no.safetensors does not exist"):
        tested(Path("no.safetensors"))


# The tools


@pytest.mark.parametrize(
    ("tool", "args", "code", "message"),
    [
        ("export_packed.py", ["{config}", "{checkpoint}", "{out}.safetensors"], 0, ""),
        ("export_packed.py", ["{config}"], 2, "error: the following arguments are required"),
        ("export_packed.py", ["c", "x", "o", "--cfg-options", "a"], 2, "expected KEY=VALUE, got 'a'"),
        ("predict_packed.py", ["{detector}", "{image}", "--out-dir", "{out}", "--batch-size", "1"], 0, ""),
        ("predict_packed.py", ["{classifier}", "{image}", "--topk", "2"], 0, ""),
        ("predict_packed.py", ["no.safetensors", "{image}"], 1, "error: packed file no.safetensors does not exist"),
        ("predict_packed.py", ["{checkpoint}", "{image}"], 1, "error: .*detector.pth is no packed file.*of PyTorch"),
        ("predict_packed.py", ["{classifier}", "{config}"], 1, "error: .*tiny_binary.py is no image"),
    ],
)
def test_tools_end_in_results_or_one_line(
    monkeypatch, capsys, configs, detector, detector_file, classifier_file, images, tmp_path, tool, args, code, message
):
    places = dict(config=configs["binary"], checkpoint=detector[1], detector=detector_file, classifier=classifier_file)
    args = [arg.format(**places, image=images[0], out=tmp_path / "out") for arg in args]
    assert call(monkeypatch, tool, *args) == code
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    if code:
        assert re.search(message, err.strip().splitlines()[-1])
        return
    if tool == "export_packed.py":
        assert f"Wrote the packed detector to {tmp_path}/out.safetensors." in out
        assert content(tmp_path / "out.safetensors") == content(detector_file)
    elif "--topk" in args:
        rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
        assert [row[:2] for row in rows] == [[str(images[0]), "1"], [str(images[0]), "2"]]
    else:
        assert f"Wrote 1 pictures to {tmp_path}/out/vis and their detections to {tmp_path}/out/preds." in out
        assert [path.name for path in (tmp_path / "out" / "vis").iterdir()] == [images[0].name]


def call(monkeypatch, tool: str, *args: str) -> int:
    """Run a tool in this process and return its exit code."""
    monkeypatch.setattr(sys, "argv", [tool, *args])
    monkeypatch.delenv("MMBIVIT_DEBUG", raising=False)
    try:
        runpy.run_path(str(TOOLS / tool), run_name="__main__")
    except SystemExit as stop:
        return stop.code
    return 0
