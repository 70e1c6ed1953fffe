"""Tiny data and configs: Mask R-CNN on a COCO folder, a classifier on image folders; a second per epoch or less."""

import json
from collections.abc import Mapping
from pathlib import Path

import cv2
import numpy as np

__all__ = ["CLASSIFIER_CONFIGS", "CLASSES", "DETECTOR_CONFIGS", "make_coco", "make_image_folders", "write_configs"]

CLASSES = ("blue", "green", "red")

FLOAT_CONFIG = """
_base_ = [
    "mmdet::_base_/models/mask-rcnn_r50_fpn.py",
    "mmdet::_base_/datasets/coco_instance.py",
    "mmdet::_base_/schedules/schedule_1x.py",
    "mmdet::_base_/default_runtime.py",
]
extractor = dict(out_channels=8, featmap_strides=[4, 8], roi_layer=dict(type="RoIAlign", sampling_ratio=1))
model = dict(
    backbone=dict(
        _delete_=True,
        type="mmbivit.BinarySwinTransformer",
        arch=dict(embed_dims=8, depths=(1, 1), num_heads=(1, 2)),
        recipe="float",
        out_indices=(0, 1),
    ),
    neck=dict(in_channels=[8, 16], out_channels=8, num_outs=2),
    rpn_head=dict(in_channels=8, feat_channels=8, anchor_generator=dict(scales=[4], strides=[4, 8])),
    roi_head=dict(
        bbox_roi_extractor=extractor,
        bbox_head=dict(in_channels=8, fc_out_channels=16, num_classes=1),
        mask_roi_extractor=extractor,
        mask_head=dict(in_channels=8, conv_out_channels=8, num_convs=1, num_classes=1),
    ),
    train_cfg=dict(rcnn=dict(sampler=dict(num=16)), rpn_proposal=dict(max_per_img=20)),
    test_cfg=dict(rpn=dict(max_per_img=20), rcnn=dict(score_thr=0.0, max_per_img=5)),
)
data_root = "DATA_ROOT/"
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="Resize", scale=(64, 64), keep_ratio=True),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(64, 64), keep_ratio=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
loader = dict(num_workers=0, persistent_workers=False)
dataset = dict(data_root=data_root, metainfo=dict(classes=("person",)))
train_dataloader = dict(**loader, batch_sampler=None, dataset=dict(**dataset, pipeline=train_pipeline))
val_dataloader = dict(**loader, dataset=dict(**dataset, pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + "annotations/instances_val2017.json")
test_evaluator = val_evaluator
train_cfg = dict(max_epochs=2, val_interval=2)
param_scheduler = []
optim_wrapper = dict(optimizer=dict(_delete_=True, type="AdamW", lr=1e-3))
default_hooks = dict(logger=dict(interval=1))
"""

BINARY_CONFIG = """
_base_ = "./tiny_float.py"
float_checkpoint = "{{$MMBIVIT_FLOAT_CHECKPOINT:https://unreachable.invalid/float.pth}}"
load_from = float_checkpoint
find_unused_parameters = True
model = dict(backbone=dict(recipe="sibivit", mlp_ratio=3, spatial_interaction=dict(ratio=1.0)))
custom_hooks = [
    dict(
        type="mmbivit.DecoupledTrainingHook",
        switch_epoch=1,
        teacher=dict(
            type="mmbivit.BinarySwinTransformer",
            arch={{_base_.model.backbone.arch}},
            recipe="float",
            out_indices=(0, 1),
            init_cfg=dict(type="Pretrained", checkpoint=float_checkpoint, prefix="backbone."),
        ),
    )
]
"""

FINETUNE_CONFIG = """
_base_ = "./tiny_float.py"
backbone_checkpoint = "{{$MMBIVIT_BACKBONE_CHECKPOINT:none}}"
model = dict(
    backbone=dict(
        recipe="sibivit",
        mlp_ratio=3,
        spatial_interaction=dict(ratio=1.0),
        init_cfg=dict(type="Pretrained", checkpoint=backbone_checkpoint, prefix="backbone."),
    )
)
"""

CLASSIFIER_CONFIG = """
default_scope = "mmengine"
pipeline = [dict(type="mmbivit.TimmTransform", input_size=32)]
loader = dict(num_workers=0, collate_fn=dict(type="default_collate"))
train_dataloader = dict(
    **loader,
    batch_size=6,
    drop_last=True,
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(type="mmbivit.TimmDataset", data_root="DATA_ROOT", split="train", pipeline=pipeline),
)
val_dataloader = dict(
    **loader,
    batch_size=4,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(type="mmbivit.TimmDataset", data_root="DATA_ROOT", split="val", pipeline=pipeline),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="mmbivit.TopKAccuracy", topk=(1, 2))
test_evaluator = val_evaluator
model = dict(
    type="mmbivit.ImageClassifier",
    num_classes=3,
    backbone=dict(
        type="mmbivit.BinarySwinTransformer",
        arch=dict(embed_dims=8, depths=(1, 1), num_heads=(1, 2)),
        recipe="float",
        window_size=4,
        drop_path_rate=0.0,
        out_indices=(1,),
    ),
)
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-2),
    clip_grad=dict(max_norm=5.0),
    paramwise_cfg=dict(flat_decay_mult=0.0),
)
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=2)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
auto_scale_lr = dict(enable=False, base_batch_size=12)
default_hooks = dict(throughput=dict(type="mmbivit.ThroughputHook"), logger=dict(type="LoggerHook", interval=1))
visualizer = dict(type="Visualizer", name="visualizer", vis_backends=[dict(type="LocalVisBackend")])
"""

BINARY_CLASSIFIER_CONFIG = """
_base_ = "./tiny_classifier_float.py"
float_checkpoint = "{{$MMBIVIT_FLOAT_CHECKPOINT:https://unreachable.invalid/float.pth}}"
load_from = float_checkpoint
find_unused_parameters = True
model = dict(
    data_preprocessor=dict(mixup=dict(mixup_alpha=0.8, cutmix_alpha=1.0), random_erasing=dict(probability=0.25)),
    backbone=dict(recipe="sibivit", mlp_ratio=3, spatial_interaction=dict(ratio=1.0)),
)
custom_hooks = [
    dict(
        type="mmbivit.DecoupledTrainingHook",
        switch_epoch=1,
        teacher=dict(
            type="mmbivit.BinarySwinTransformer",
            arch={{_base_.model.backbone.arch}},
            recipe="float",
            window_size=4,
            out_indices=(1,),
            init_cfg=dict(type="Pretrained", checkpoint=float_checkpoint),
        ),
    )
]
"""

# Templates by file name; DATA_ROOT is replaced by the folder of the data.
DETECTOR_CONFIGS = {"tiny_float": FLOAT_CONFIG, "tiny_binary": BINARY_CONFIG, "tiny_finetune": FINETUNE_CONFIG}
CLASSIFIER_CONFIGS = {
    "tiny_classifier_float": CLASSIFIER_CONFIG,
    "tiny_classifier_binary": BINARY_CLASSIFIER_CONFIG,
}


def make_coco(root: Path, train: int = 4, val: int = 2) -> Path:
    """Write images of one bright rectangle each, in COCO's folder layout."""
    rng = np.random.default_rng(0)
    (root / "annotations").mkdir(parents=True)
    for split, count in (("train", train), ("val", val)):
        folder = root / f"{split}2017"
        folder.mkdir()
        images, annotations = [], []
        for i in range(1, count + 1):
            picture = rng.integers(0, 80, (64, 64, 3), dtype=np.uint8)
            x, y = (int(v) for v in rng.integers(4, 24, 2))
            picture[y : y + 32, x : x + 32] += 150
            cv2.imwrite(str(folder / f"{i:012d}.png"), picture)
            images.append(dict(id=i, file_name=f"{i:012d}.png", width=64, height=64))
            corners = [x, y, x + 32, y, x + 32, y + 32, x, y + 32]
            annotations.append(
                dict(id=i, image_id=i, category_id=1, bbox=[x, y, 32, 32], area=1024, iscrowd=0, segmentation=[corners])
            )
        content = dict(images=images, annotations=annotations, categories=[dict(id=1, name="person")])
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
    return root


def make_image_folders(root: Path, train: int = 6, val: int = 3) -> Path:
    """Write noisy 32 x 32 images of one colour per class into ``root/{train,val}/<class>/``."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for channel, name in enumerate(CLASSES):  # OpenCV's order of colours
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                picture = rng.integers(0, 120, (32, 32, 3), dtype=np.uint8)
                picture[..., channel] += 100
                cv2.imwrite(str(folder / f"{name}_{i}.png"), picture)
    return root


def write_configs(folder: Path, data_root: Path, templates: Mapping[str, str] = DETECTOR_CONFIGS) -> dict[str, Path]:
    """Write configs and return their paths by the last word of their names: ``float``, ``binary``, ``finetune``."""
    paths = {}
    for name, text in templates.items():
        path = folder / f"{name}.py"
        path.write_text(text.replace("DATA_ROOT", data_root.as_posix()))
        paths[name.rpartition("_")[2]] = path
    return paths
