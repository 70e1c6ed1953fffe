# Plugging the binary backbone into another detector: exchange the backbone, tell the neck its channels, add the hook.
# Stages and schedule as in mask_rcnn_sibivit_swin_t.py (mmdet's retinanet_swin-t trains with SGD).
_base_ = [
    "mmdet::_base_/models/retinanet_r50_fpn.py",
    "mmdet::_base_/datasets/coco_detection.py",
    "./_base_/swin_adamw_1x.py",
    "./_base_/runtime.py",
]

# No float RetinaNet Swin-T is public. The backbone of the float Mask R-CNN is the teacher and the student's start.
float_checkpoint = "{{$MMBIVIT_FLOAT_CHECKPOINT:https://download.openmmlab.com/mmdetection/v2.0/swin/mask_rcnn_swin-t-p4-w7_fpn_1x_coco/mask_rcnn_swin-t-p4-w7_fpn_1x_coco_20210902_120937-9d6b7cfa.pth}}"
pretrained = dict(type="Pretrained", checkpoint=float_checkpoint, prefix="backbone.")

model = dict(
    backbone=dict(
        _delete_=True,
        type="mmbivit.BinarySwinTransformer",
        arch="tiny",
        recipe="sibivit",
        spatial_interaction=dict(ratio=1.0),
        mlp_ratio=3,
        drop_path_rate=0.2,
        out_indices=(1, 2, 3),  # RetinaNet starts at stride 8
        init_cfg=pretrained,
    ),
    neck=dict(in_channels=[192, 384, 768], start_level=0),
)

custom_hooks = [
    dict(
        type="mmbivit.DecoupledTrainingHook",
        switch_epoch=6,
        teacher=dict(type="mmbivit.BinarySwinTransformer", arch="tiny", recipe="float", init_cfg=pretrained),
        distill_weight=1.0,
        reset_optimizer=True,  # measured on digits: docs/experiments.md
    )
]
