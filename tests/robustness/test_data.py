"""Data as it comes: both detectors train on it in both stages, or the run ends with one line that names the file."""

import math
from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import HorizontalBoxes
from mmdet.structures.mask import BitmapMasks
from mmengine.config import Config
from mmengine.structures import InstanceData
from PIL import Image

from mmbivit.apis import evaluate, evaluation_config, train, train_config
from mmbivit.apis.errors import user_errors
from tests.analysis.logs import logged
from tests.robustness.dirty_coco import KINDS, make_dirty_coco, set_cascade
from tests.tiny import CLASSIFIER_CONFIGS, make_coco, make_image_folders, write_configs

TRAIN, VAL = "annotations/instances_train2017.json", "annotations/instances_val2017.json"


def run(capsys, function, *args) -> str:
    """Run something that must end as ``tools/`` do with an error of the user; return its one line."""
    with pytest.raises(SystemExit), user_errors():
        function(*args)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


@pytest.fixture
def root(tmp_path) -> Path:
    return make_coco(tmp_path / "coco")


def tiny_config(root: Path, name: str, kind: str = "float", **options) -> Config:
    configs = write_configs(root.parent, root)
    return train_config(
        configs[kind],
        work_dir=str(root.parent / "work"),
        seed=0,
        float_checkpoint=options.pop("float_checkpoint", None),
        cfg_options={"experiment_name": name, **options},
    )


# What trains


@pytest.mark.parametrize("detector", ["mask_rcnn", "cascade_mask_rcnn"])
def test_odd_images_and_batches_without_objects(tmp_path, detector, float_checkpoint):
    """One image a batch: 9 of 20 have no object, in stage 1 with a teacher and in stage 2."""
    root = make_dirty_coco(tmp_path / "coco")
    dataset = "train_dataloader.dataset"
    options = {
        "train_dataloader.batch_size": 1,
        f"{dataset}.filter_cfg": None,
        f"{dataset}.pipeline.2.keep_ratio": False,
    }
    cfg = tiny_config(root, detector, "binary", float_checkpoint=str(float_checkpoint), **options)
    if detector == "cascade_mask_rcnn":
        set_cascade(cfg)
    model = train(cfg)
    rows = logged(tmp_path / "work", "loss")
    assert len(rows) == 40
    assert ["loss_distill" in row for row in rows] == [True] * 20 + [False] * 20
    losses = [value for row in rows for key, value in row.items() if "loss" in key]
    assert all(map(math.isfinite, losses))
    assert all(value.isfinite().all() for value in model.state_dict().values())
    (log,) = (tmp_path / "work").glob("*/*.log")
    assert "20 of 20 images and 11 of 19 annotations are used; 1 annotations of other classes" in log.read_text()


@pytest.mark.parametrize("detector", ["mask_rcnn", "cascade_mask_rcnn"])
@pytest.mark.parametrize("stage", [1, 2])
def test_gradients_of_a_batch_without_objects(root, detector, stage):
    """They are those of the classification losses of RPN and heads, and finite; boxes and masks have none."""
    cfg = tiny_config(root, f"{detector}_{stage}")
    cfg.model.backbone.update(recipe="sibivit", mlp_ratio=3, spatial_interaction=dict(ratio=1.0))
    if detector == "cascade_mask_rcnn":
        set_cascade(cfg)
        for head in cfg.model.roi_head.bbox_head:
            head.norm_cfg.type = "BN"  # what a runner makes of it
    torch.manual_seed(0)
    model = MODELS.build(cfg.model).train()
    model.backbone.set_stage(stage)
    sample = DetDataSample(metainfo=dict(img_shape=(64, 64), ori_shape=(64, 64), scale_factor=(1.0, 1.0)))
    sample.gt_instances = InstanceData(
        bboxes=HorizontalBoxes(torch.zeros(0, 4)),
        labels=torch.zeros(0, dtype=torch.long),
        masks=BitmapMasks([], 64, 64),
    )
    sample.ignored_instances = sample.gt_instances.clone()
    batch = dict(inputs=[torch.randint(0, 255, (3, 64, 64), dtype=torch.uint8)], data_samples=[sample])
    losses = model(**model.data_preprocessor(batch, training=True), mode="loss")
    total, values = model.parse_losses(losses)
    total.backward()
    for name, value in values.items():
        assert value.isfinite(), name
        if name.endswith(("loss_bbox", "loss_mask", "loss_rpn_bbox")):
            assert value == 0, name
    assert values["loss_rpn_cls"] > 0 and sum(value for name, value in values.items() if "loss_cls" in name) > 0
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    moved = {name.partition(".")[0] for name, gradient in gradients.items() if gradient.any()}
    assert moved == {"backbone", "neck", "rpn_head", "roi_head"}


# What is refused


def spoil_image(root: Path, split: str, content: bytes) -> Path:
    path = root / f"{split}2017" / "000000000001.png"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(("loop", "workers"), [("epochs", 0), ("iterations", 1)])
def test_a_broken_image_is_named(root, capsys, workers, loop):
    path = spoil_image(root, "train", b"not an image")
    cfg = tiny_config(root, f"broken_{workers}_{loop}", **{"train_dataloader.num_workers": workers})
    if loop == "iterations":
        cfg.train_cfg = dict(type="IterBasedTrainLoop", max_iters=4, val_interval=4)
    message = f"{path} is truncated, damaged or no image: it cannot be decoded; replace it, or remove it from the"
    assert message in run(capsys, train, cfg)


def test_a_broken_image_of_the_validation_is_named(root, capsys, float_checkpoint):
    path = spoil_image(root, "val", b"")
    line = run(capsys, train, tiny_config(root, "broken_val", **{"train_cfg.val_interval": 1}))
    assert f"{path} is empty; replace it, or remove it from the annotation file" in line
    configs = write_configs(root.parent, root)
    options = {"experiment_name": "broken_test"}
    cfg = evaluation_config(configs["float"], float_checkpoint, work_dir=str(root.parent), cfg_options=options)
    assert f"{path} is empty; replace it" in run(capsys, evaluate, cfg)


@pytest.mark.parametrize("file", [TRAIN, VAL])
@pytest.mark.parametrize("content", ["", "[]"])
def test_a_malformed_annotation_file_is_named(root, capsys, file, content, float_checkpoint):
    (root / file).write_text(content)
    assert run(capsys, train, tiny_config(root, "never_built")).startswith(f"{root / file} ")
    if file == VAL:
        cfg = evaluation_config(write_configs(root.parent, root)["float"], float_checkpoint, work_dir=str(root.parent))
        assert run(capsys, evaluate, cfg).startswith(f"{root / file} ")
    assert not (root.parent / "work").exists()  # it was found before anything was built


# Classifiers


@pytest.fixture
def folders(tmp_path) -> Path:
    """Class folders with images of all kinds in train."""
    root = make_image_folders(tmp_path / "folders", train=4)
    picture = Image.open(root / "train" / "blue" / "blue_0.png")
    for name, convert in KINDS.items():
        convert(picture).save(root / "train" / "blue" / name)
    return root


def classifier_config(root: Path, name: str, kind: str = "binary", **options) -> Config:
    configs = write_configs(root.parent, root, CLASSIFIER_CONFIGS)
    options = {"experiment_name": name, "custom_hooks.0.teacher": None, **options}
    if kind == "float":
        del options["custom_hooks.0.teacher"]
    return train_config(
        configs[kind],
        work_dir=str(root.parent / "work"),
        float_checkpoint="none" if kind == "binary" else None,
        cfg_options=options,
    )


def test_a_classifier_trains_on_images_of_all_kinds(folders):
    train(classifier_config(folders, "kinds", "float", **{"train_dataloader.batch_size": 2}))
    rows = logged(folders.parent / "work", "loss")
    assert len(rows) == 2 * (12 + len(KINDS)) // 2
    assert all(math.isfinite(row["loss"]) for row in rows)


def test_a_classifier_names_a_broken_image(folders, capsys):
    path = folders / "val" / "red" / "red_0.png"
    path.write_text("not an image")
    line = run(capsys, train, classifier_config(folders, "broken_class", "float", **{"train_cfg.max_epochs": 1}))
    assert line.startswith(f"{path} cannot be decoded")
    skip = {"val_dataloader.dataset.skip_corrupt": True}
    line = run(capsys, train, classifier_config(folders, "skips", "float", **skip))
    assert line.startswith("val_dataloader.dataset.skip_corrupt=True would count the image after a corrupt one twice")
