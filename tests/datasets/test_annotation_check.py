"""What mmdet would leave out is counted as mmdet does it; files that do not fit the config are refused."""

import copy
import json
from pathlib import Path

import pytest
import torch
from mmdet.datasets import CocoDataset
from mmdet.evaluation import CocoMetric
from mmengine.config import Config

from mmbivit.datasets import annotation_check, check_coco_data
from tests.robustness.dirty_coco import make_dirty_coco
from tests.tiny import make_coco

TRAIN, VAL = "annotations/instances_train2017.json", "annotations/instances_val2017.json"


def make_config(root: Path, classes: tuple = ("person",), with_mask: bool = True, num_classes: int = 1) -> Config:
    """A Mask R-CNN, as far as the check looks at it."""
    loading = [dict(type="LoadImageFromFile"), dict(type="mmdet.LoadAnnotations", with_bbox=True, with_mask=with_mask)]

    def dataset(split: str, **options) -> dict:
        names = dict(ann_file=f"annotations/instances_{split}2017.json", data_prefix=dict(img=f"{split}2017/"))
        info = dict(metainfo=dict(classes=classes), pipeline=copy.deepcopy(loading))
        return dict(dataset=dict(type="CocoDataset", data_root=str(root), **names, **info, **options))

    head = dict(num_classes=num_classes)
    return Config(
        dict(
            model=dict(type="MaskRCNN", roi_head=dict(bbox_head=head, mask_head=copy.deepcopy(head))),
            train_dataloader=dataset("train", filter_cfg=dict(filter_empty_gt=True, min_size=32)),
            val_dataloader=dataset("val", test_mode=True),
            val_evaluator=dict(type="CocoMetric", ann_file=str(root / VAL), metric=["bbox", "segm"]),
        )
    )


@pytest.fixture
def root(tmp_path) -> Path:
    return make_coco(tmp_path / "coco", train=4, val=2)


def edit(root: Path, change, file: str = TRAIN) -> None:
    content = json.loads((root / file).read_text())
    change(content)
    (root / file).write_text(json.dumps(content))


def add_class(content: dict, name: str, category_id: int) -> None:
    content["categories"].insert(0, dict(id=category_id, name=name))


def message_of(cfg: Config, kind: type[Exception] = ValueError) -> str:
    with pytest.raises(kind) as error:
        check_coco_data(cfg, ("train", "val"))
    assert "\n" not in str(error.value)
    return str(error.value)


# What is left out


def test_nothing_to_say_of_clean_data(root):
    assert check_coco_data(make_config(root), ("train", "val")) == []


@pytest.mark.parametrize("filter_cfg", [None, dict(filter_empty_gt=True, min_size=32), dict(min_size=2)])
@pytest.mark.parametrize("with_mask", [True, False])
def test_counts_are_those_of_mmdet(tmp_path, filter_cfg, with_mask):
    """Build mmdet's data set and count what is in it."""
    root = make_dirty_coco(tmp_path / "coco")
    cfg = make_config(root, with_mask=with_mask)
    cfg.train_dataloader.dataset.filter_cfg = filter_cfg
    (note,) = check_coco_data(cfg, ("train",))
    dataset = CocoDataset(**{key: value for key, value in cfg.train_dataloader.dataset.items() if key != "type"})
    objects = [int((~dataset[i]["gt_ignore_flags"]).sum()) for i in range(len(dataset))]
    annotations = len(json.loads((root / TRAIN).read_text())["annotations"])
    assert f": {len(dataset)} of 20 images and {sum(objects)} of {annotations} annotations are used; " in note
    assert f", {objects.count(0)} images without objects used as background" in note


def test_says_why(tmp_path):
    root = make_dirty_coco(tmp_path / "coco")
    (note,) = check_coco_data(make_config(root), ("train",))
    assert note == (
        f"{root / TRAIN} (train_dataloader): 15 of 20 images and 8 of 19 annotations are used; "
        "1 annotations of other classes than metainfo.classes left out, 1 annotations with 'ignore' left out, "
        "1 boxes without area left out, 1 boxes outside the image left out, "
        "1 boxes less than a pixel wide or high, or with an 'area' of 0, left out, "
        "1 crowd regions (iscrowd) ignored by the losses, "
        "2 polygons with less than three points or an odd number of coordinates left out, "
        "2 objects without a usable mask left out, "
        "2 images without annotations left out (filter_cfg.filter_empty_gt), "
        "3 images smaller than 32 pixels left out (filter_cfg.min_size), 7 images without objects used as background"
    )


def test_encoded_masks_need_poly2mask(root):
    mask = dict(size=[64, 64], counts=[1000, 2000, 1096])
    edit(root, lambda content: content["annotations"][0].update(segmentation=mask))
    cfg = make_config(root)
    assert check_coco_data(cfg, ("train",)) == []
    cfg.train_dataloader.dataset.pipeline[1].poly2mask = False
    assert "1 objects without a usable mask left out" in check_coco_data(cfg, ("train",))[0]


def test_training_needs_an_object(root):
    def normalise(content):
        for annotation in content["annotations"]:
            annotation["bbox"] = [value / 64 for value in annotation["bbox"]]

    edit(root, normalise)
    message = message_of(make_config(root))
    assert f"{root / TRAIN}: no object is left to train on in train_dataloader; 4 boxes less than a pixel" in message
    edit(root, lambda content: content["annotations"].clear())
    cfg = make_config(root)
    assert "no image is left to train on in train_dataloader; 4 images without annotations" in message_of(cfg)
    cfg.train_dataloader.dataset.filter_cfg = None
    assert message_of(cfg).endswith("no object is left to train on in train_dataloader; it has no annotations")


def test_masks_are_only_looked_at_where_they_are_used(root):
    edit(root, lambda content: content["annotations"][2].pop("segmentation"))
    assert "annotation 3 has no segmentation, but masks are used (with_mask" in message_of(make_config(root))
    assert check_coco_data(make_config(root, with_mask=False), ("train",)) == []


# Classes


def test_classes_that_the_file_lacks(root):
    message = message_of(make_config(root, classes=("cat", "person"), num_classes=2))
    assert message.startswith(
        f"{root / TRAIN} has no categories 'cat', which are among the 2 classes of train_dataload"
    )
    assert "it has 'person': set metainfo" in message
    edit(root, lambda content: (content["annotations"].clear(), content["categories"].clear()))
    message = message_of(make_config(root))
    assert message == f"{root / TRAIN} has no categories; train_dataloader needs 'person'"


def test_default_classes_are_those_of_coco(root):
    cfg = make_config(root, num_classes=80)
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        del loader.dataset["metainfo"]
    assert "has no categories 'bicycle', 'car', 'motorcycle', 'airplane', 'bus' and 74 more" in message_of(cfg)


def test_other_classes_are_left_out(root):
    edit(root, lambda content: (add_class(content, "cat", 90), content["annotations"][1].update(category_id=90)))
    (note,) = check_coco_data(make_config(root), ("train",))
    assert "3 of 4 images and 3 of 4 annotations are used; 1 annotations of other classes" in note
    assert "1 images without annotations left out" in note


def test_labels_follow_the_order_of_the_file(root):
    for file in (TRAIN, VAL):
        edit(root, lambda content: add_class(content, "cat", 90), file)
    cfg = make_config(root, ("person", "cat"), num_classes=2)
    assert "set metainfo=dict(classes=('cat', 'person',)) of the data set" in message_of(cfg)
    # What is refused: mmdet calls the objects cats.
    dataset = CocoDataset(**{key: value for key, value in cfg.train_dataloader.dataset.items() if key != "type"})
    label = dataset.get_data_info(0)["instances"][0]["bbox_label"]
    assert dataset.metainfo["classes"][label] == "cat"
    assert check_coco_data(make_config(root, ("cat", "person"), num_classes=2), ("train", "val")) == []


def test_classes_without_comma_are_a_text(root):
    assert "metainfo.classes is the text 'person'" in message_of(make_config(root, classes="person"))


@pytest.mark.parametrize("head", ["bbox_head", "mask_head"])
def test_number_of_classes_of_the_heads(root, head):
    cfg = make_config(root)
    cfg.model.roi_head[head].num_classes = 80
    message = f"model.roi_head.{head}.num_classes=80, but the data of train_dataloader has 1 classes, 'person': set"
    assert message in message_of(cfg)
    cfg.model.roi_head[head] = [dict(num_classes=1), dict(num_classes=80)]  # a cascade
    assert message in message_of(cfg)
    cfg.model = dict(type="DetTTAModel", module=cfg.model)
    assert message in message_of(cfg)


# Images


def test_missing_images(root):
    for name in ("000000000002.png", "000000000003.png"):
        (root / "train2017" / name).unlink()
    message = message_of(make_config(root), FileNotFoundError)
    assert message.startswith(f"{root / 'train2017' / '000000000002.png'} does not exist, and 2 of the 4 images")
    edit(root, lambda content: [content["annotations"].pop(1) for _ in range(2)])
    assert len(check_coco_data(make_config(root), ("train",))) == 1  # they are not used


def test_images_in_folders_below(root):
    (root / "train2017" / "a").mkdir()
    (root / "train2017" / "000000000001.png").rename(root / "train2017" / "a" / "1.png")
    edit(root, lambda content: content["images"][0].update(file_name="a/1.png"))
    assert check_coco_data(make_config(root), ("train",)) == []
    edit(root, lambda content: content["images"][0].update(file_name="b/1.png"))
    assert "b/1.png does not exist, and 1 of the 4" in message_of(make_config(root), FileNotFoundError)


@pytest.mark.parametrize("size", [(4000, 1), (1, 4000)])
def test_images_of_which_nothing_is_left(root, size):
    edit(root, lambda content: content["images"][1].update(width=size[0], height=size[1]), VAL)
    cfg = make_config(root)
    resize = dict(type="Resize", scale=(1333, 800), keep_ratio=True)
    cfg.val_dataloader.dataset.pipeline.insert(1, resize)
    message = message_of(cfg)
    assert f"000000000002.png has {size[0]} x {size[1]} pixels, of which nothing is left when Resize makes" in message
    cfg.val_dataloader.dataset.pipeline[1]["scale"] = (4000, 800)
    check_coco_data(cfg, ("val",))
    cfg.val_dataloader.dataset.pipeline[1] = dict(resize, keep_ratio=False)
    check_coco_data(cfg, ("val",))
    choices = dict(type="RandomChoiceResize", scales=[(4000, 800), (1333, 480)], keep_ratio=True)
    cfg.val_dataloader.dataset.pipeline[1] = dict(type="RandomChoice", transforms=[[choices]])
    assert "makes it fit into (1333, 480)" in message_of(cfg)


# Evaluators


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["annotations"][0].pop("iscrowd"), "annotation 1 has no iscrowd, which evaluation needs"),
        (lambda c: c["annotations"][0].pop("segmentation"), "annotation 1 has no segmentation, but masks are used"),
        (lambda c: c["annotations"][0].update(segmentation=[[1, 1, 9, 9]]), "annotation 1 has a polygon of less than"),
        (lambda c: c["annotations"].clear(), "has no annotations of the classes of val_evaluator: there is nothing"),
        (lambda c: c.pop("annotations"), "it has no 'annotations'"),
        (lambda c: c["categories"][0].update(name="cat"), "has no categories 'person'"),
    ],
)
def test_evaluators_need_more(root, change, message):
    edit(root, change, VAL)
    cfg = make_config(root, with_mask=False)
    assert str(root / VAL) in message_of(cfg) and message in message_of(cfg)


def test_prediction_needs_no_annotations(root):
    edit(root, lambda content: content.pop("annotations"), VAL)
    cfg = make_config(root)
    cfg.val_evaluator.format_only = True
    assert check_coco_data(cfg, ("val",)) == []
    assert len(CocoDataset(**{k: v for k, v in cfg.val_dataloader.dataset.items() if k != "type"})) == 2


def test_other_images_than_those_of_the_data_set(root):
    cfg = make_config(root)
    cfg.val_evaluator.ann_file = str(root / TRAIN)
    message = f"{root / TRAIN} of val_evaluator has 2 images that {root / VAL} of the data set has not, and lacks 0"
    assert message in message_of(cfg)


def test_id_zero_counts_as_missed(root):
    edit(root, lambda content: content["annotations"][0].update(id=0), VAL)
    (note,) = check_coco_data(make_config(root), ("val",))
    assert "(val_evaluator): 2 of 2 annotations are used; 1 annotation with the id 0 counted as missed" in note
    # It does: perfect predictions find half of the objects.
    metric = CocoMetric(ann_file=str(root / VAL), metric="bbox")
    metric.dataset_meta = dict(classes=("person",))
    for annotation in json.loads((root / VAL).read_text())["annotations"]:
        x, y, width, height = annotation["bbox"]
        found = dict(
            bboxes=torch.tensor([[x, y, x + width, y + height]]), scores=torch.ones(1), labels=torch.zeros(1).int()
        )
        sample = dict(img_id=annotation["image_id"], ori_shape=(64, 64), pred_instances=found)
        metric.process({}, [sample])
    assert metric.evaluate(size=2)["coco/bbox_mAP_50"] < 0.6


def test_each_file_is_read_once(root, monkeypatch):
    paths = []
    read = annotation_check.read_annotation_file
    monkeypatch.setattr(
        annotation_check, "read_annotation_file", lambda path, *args: paths.append(path) or read(path, *args)
    )
    check_coco_data(make_config(root), ("train", "val"))
    assert paths == [str(root / TRAIN), str(root / VAL)]


def test_other_formats_are_left_alone(root):
    cfg = make_config(root)
    cfg.train_dataloader.dataset.type = "MyDataset"
    (root / TRAIN).write_text("[]")
    assert check_coco_data(cfg, ("train",)) == []
