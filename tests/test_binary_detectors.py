"""Detectors with binary necks and heads from training to predictions: the tools' own way, on tiny data."""

import json

import numpy as np
import pytest
import torch
from mmengine.config import Config

from mmbivit import deploy
from mmbivit.apis import evaluate, evaluation_config, export_packed, load_config, predict, train, train_config
from mmbivit.apis.checkpoints import load_trained_model
from mmbivit.models.stage import staged_modules
from tests.analysis.logs import logged

PARTS = ["neck", "rpn", "box", "mask"]
DISTILLED = ("neck", "dense_head", "box_head", "mask_head")


def teach_whole_detector(cfg: Config) -> None:
    """Make the float detector of the config the teacher, instead of its backbone, and distil all of it."""
    hook = cfg.custom_hooks[0]
    backbone = dict(hook.teacher)
    init_cfg = dict(type="Pretrained", checkpoint=backbone.pop("init_cfg").checkpoint)
    float_parts = load_config(cfg.filename).model
    parts = {key: float_parts[key] for key in ("neck", "rpn_head", "roi_head", "test_cfg")}
    hook.teacher = dict(type="mmdet.MaskRCNN", backbone=backbone, train_cfg=None, **parts, init_cfg=init_cfg)
    hook.distill_loss = [dict(type="mmbivit.BlockMSELoss")]
    hook.distill_loss += [dict(type="mmbivit.DetectorMSELoss", of=part) for part in DISTILLED]


@pytest.fixture(scope="module")
def options(configs, float_checkpoint):
    return dict(config=configs["binary"], float_checkpoint=str(float_checkpoint), seed=0, binary_parts=PARTS)


@pytest.fixture(scope="module")
def run(tmp_path_factory, options):
    """The work dir of a detector trained for an epoch in each stage, all of it distilled, with an average."""
    work_dir = tmp_path_factory.mktemp("whole") / "binary_detector"
    cfg = train_config(work_dir=str(work_dir), ema=0.5, **options)
    teach_whole_detector(cfg)
    cfg.custom_hooks.append(dict(type="mmbivit.SignFlipsHook"))
    train(cfg)
    return work_dir


def test_the_hook_switches_the_whole_detector(run):
    lines = [line for line in logged(run) if "loss" in line]
    switched = [i for i, line in enumerate(lines) if "loss_distill" not in line][0]
    for i, line in enumerate(lines):
        assert all((f"loss_distill_{part}" in line) == (i < switched) for part in DISTILLED)
        assert np.isfinite(line["loss"])
    saved = torch.load(run / "epoch_2.pth", weights_only=False)
    for weights in (saved["state_dict"], saved["ema_state_dict"]):
        stages = {key: int(value) for key, value in weights.items() if key.endswith("training_stage")}
        assert len(stages) == 5 and set(stages.values()) == {2}
    first = torch.load(run / "epoch_1.pth", weights_only=False)["state_dict"]
    assert {int(value) for key, value in first.items() if key.endswith("training_stage")} == {1}


def test_sign_flips_of_neck_and_heads_are_logged(run):
    layers = {key for line in logged(run, "sign_flips") for key in line}
    names = ("neck.fpn_convs.0.conv", "rpn_head.rpn_conv", "roi_head.bbox_head.shared_fcs.0")
    assert {f"sign_flips/{name}" for name in (*names, "roi_head.mask_head.convs.0.conv")} <= layers


def test_a_resumed_run_equals_one_without_interruption(run, options, tmp_path):
    cfg = train_config(work_dir=str(tmp_path), ema=0.5, resume=str(run / "epoch_1.pth"), **options)
    teach_whole_detector(cfg)
    cfg.custom_hooks.append(dict(type="mmbivit.SignFlipsHook"))
    train(cfg)
    whole, resumed = (torch.load(folder / "epoch_2.pth", weights_only=False) for folder in (run, tmp_path))
    for key in ("state_dict", "ema_state_dict"):
        assert all(torch.equal(value, resumed[key][name]) for name, value in whole[key].items())


def predicted(config, checkpoint, image, out_dir):
    predict(config, checkpoint, [image], out_dir)
    return json.loads((out_dir / "preds" / f"{image.stem}.json").read_text())


def test_it_is_evaluated_predicts_and_packs_its_backbone(run, images, tmp_path):
    from mmdet.apis import DetInferencer

    config, checkpoint = run / "tiny_binary.py", run / "epoch_2.pth"
    metrics = evaluate(evaluation_config(config, checkpoint, work_dir=str(tmp_path / "eval")))
    assert "coco/segm_mAP" in metrics

    inferencer = DetInferencer(model=str(config), weights=str(checkpoint), device="cpu", show_progress=False)
    (expected,) = inferencer([str(images[0])], no_save_vis=True)["predictions"]
    assert {part.stage for part in staged_modules(inferencer.model).values()} == {2}
    ours = predicted(config, checkpoint, images[0], tmp_path / "ours")
    assert ours["scores"] == pytest.approx(expected["scores"], abs=1e-5)

    report = export_packed(config, checkpoint, tmp_path / "detector.safetensors")
    assert report.difference < 1e-5
    packed = predicted(None, tmp_path / "detector.safetensors", images[0], tmp_path / "packed")
    assert packed["scores"] == pytest.approx(ours["scores"], abs=1e-4)
    assert packed["labels"] == ours["labels"]

    half = export_packed(config, checkpoint, tmp_path / "half.safetensors", half=True)
    model = deploy.load(tmp_path / "half.safetensors")
    floats = [weight for weight in model.parameters() if weight.ndim > 1]
    assert floats and all(torch.equal(weight, weight.half().float()) for weight in floats)
    assert report.file_bytes - half.file_bytes == pytest.approx(2 * sum(weight.numel() for weight in floats), abs=100)
    halves = predicted(None, tmp_path / "half.safetensors", images[0], tmp_path / "halves")
    assert halves["scores"][0] == pytest.approx(packed["scores"][0], abs=1e-2)


def test_the_float_heads_of_a_checkpoint_are_refused_in_evaluation(run, detector):
    cfg = load_config(run / "tiny_binary.py")
    with pytest.raises(ValueError, match="has a float neck, the config's is binary: train that first"):
        load_trained_model(cfg, detector[1])


def test_parts_with_another_number_of_stages_are_refused(options, tmp_path):
    cfg = train_config(work_dir=str(tmp_path), **options)
    cfg.model.neck.binary = dict(training_stages=[])
    with pytest.raises(
        ValueError, match="switch_epoch=1; expected 0, one for each of the 1 training stages of BinaryFPN"
    ):
        train(cfg)


def test_a_binary_neck_trains_in_two_stages_behind_a_backbone_of_another_library(options, tmp_path):
    cfg = train_config(work_dir=str(tmp_path), **options)
    arch = cfg.model.backbone.arch
    kept = dict(embed_dims=arch.embed_dims, depths=arch.depths, num_heads=arch.num_heads, out_indices=(0, 1))
    cfg.model.backbone = dict(type="mmdet.SwinTransformer", **kept, strides=(4, 2))
    cfg.load_from = None
    cfg.custom_hooks[0].teacher = None
    model = train(cfg)
    assert {name: part.stage for name, part in staged_modules(model).items()}.keys() >= {"neck", "rpn_head"}
    assert model.neck.stage == 2
