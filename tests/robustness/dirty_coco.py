"""A COCO folder in which little is as it should be, and yet can be trained on; and a tiny Cascade Mask R-CNN."""

import json
from pathlib import Path

import numpy as np
from mmengine.config import Config
from PIL import Image

from tests.tiny import make_coco

CONFIGS = Path(__file__).parents[2] / "configs"

__all__ = ["KINDS", "make_dirty_coco", "set_cascade"]

# Images by name: how the 64 x 64 picture is stored.
KINDS = {
    "grey.png": lambda picture: picture.convert("L"),
    "16_bit_grey.png": lambda picture: Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257),
    "cmyk.jpg": lambda picture: picture.convert("CMYK"),
    "alpha.png": lambda picture: picture.convert("RGBA"),
    "grey_alpha.png": lambda picture: picture.convert("LA"),
    "palette.png": lambda picture: picture.convert("P"),
    "one_bit.png": lambda picture: picture.convert("1"),
    "1x1.png": lambda picture: picture.resize((1, 1)),
    "1x4000.png": lambda picture: picture.resize((1, 4000)),
    "4000x1.png": lambda picture: picture.resize((4000, 1)),
}
SQUARE = dict(bbox=[8, 8, 40, 40], segmentation=[[8, 8, 48, 8, 48, 48, 8, 48]], area=1600, iscrowd=0, category_id=90)
# Annotations by the image that has nothing but them; nothing of them is an object to learn.
ODD_ANNOTATIONS = {
    "nothing": None,
    "crowd": dict(SQUARE, iscrowd=1, segmentation=dict(size=[64, 64], counts=[520, 2000, 1576])),
    "no_area": dict(SQUARE, bbox=[8, 8, 0, 0], area=0),
    "thin": dict(SQUARE, bbox=[8, 8, 40, 0.5]),
    "outside": dict(SQUARE, bbox=[70, 8, 40, 40]),
    "ignored": dict(SQUARE, ignore=1),
    "two_points": dict(SQUARE, segmentation=[[8, 8, 48, 48]]),
    "odd_polygon": dict(SQUARE, segmentation=[[8, 8, 48, 8, 48, 48, 8]]),
    "other_class": dict(SQUARE, category_id=7),
}


def make_dirty_coco(root: Path) -> Path:
    """Write images of all kinds with one object each, and images with odd annotations only; the ids have gaps."""
    make_coco(root)
    path = root / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    picture = Image.open(root / "train2017" / content["images"][0]["file_name"]).convert("RGB")
    images, annotations = [], []

    def add(name: str, picture: Image.Image, annotation: dict | None) -> None:
        picture.save(root / "train2017" / name)
        width, height = picture.size
        images.append(dict(id=1000 - 3 * len(images), file_name=name, width=width, height=height))
        if annotation is not None:
            annotations.append(dict(annotation, id=50 + 5 * len(annotations), image_id=images[-1]["id"]))

    for name, convert in KINDS.items():
        stored = convert(picture)
        width, height = stored.size
        corners = [0, 0, width, 0, width, height, 0, height]
        whole = dict(SQUARE, bbox=[0, 0, width, height], segmentation=[corners], area=width * height)
        add(name, stored, SQUARE if stored.size == (64, 64) else whole)
    for name, annotation in ODD_ANNOTATIONS.items():
        add(f"{name}.png", picture, annotation)
    add(
        "partly_outside.png",
        picture,
        dict(SQUARE, bbox=[-30, -30, 80, 200], segmentation=[[-30, -30, 50, -30, 50, 170]]),
    )
    categories = [dict(id=7, name="other"), dict(id=90, name="person")]
    path.write_text(json.dumps(dict(images=images, annotations=annotations, categories=categories)))
    return root


def set_cascade(cfg: Config) -> None:
    """Make the tiny Mask R-CNN of ``cfg`` a Cascade Mask R-CNN with the heads of our configs, but for their size."""
    cascade = Config.fromfile(CONFIGS / "_base_" / "cascade_mask_rcnn_sibivit_swin_t.py").model
    heads = cascade.roi_head
    for extractor in ("bbox_roi_extractor", "mask_roi_extractor"):
        heads[extractor] = cfg.model.roi_head[extractor]
    for head in heads.bbox_head:
        head.update(in_channels=8, conv_out_channels=8, fc_out_channels=16, num_shared_convs=1, num_classes=1)
    heads.mask_head = cfg.model.roi_head.mask_head
    for settings in cascade.train_cfg.rcnn:
        settings.sampler.num = 16
    cfg.model.update(type=cascade.type, roi_head=heads)
    cfg.model.train_cfg.rcnn = cascade.train_cfg.rcnn
