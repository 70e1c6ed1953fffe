# Cascade Mask R-CNN with the heads of the official Swin: four convolutions with SyncBN and one linear layer, GIoU on
# decoded boxes, regression per class. MMEngine turns SyncBN into BN outside distributed training; the keys of
# checkpoints are the same.
_base_ = "mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py"

bbox_head = dict(
    type="ConvFCBBoxHead",
    num_shared_convs=4,
    num_shared_fcs=1,
    in_channels=256,
    conv_out_channels=256,
    fc_out_channels=1024,
    roi_feat_size=7,
    num_classes=80,
    reg_class_agnostic=False,
    reg_decoded_bbox=True,
    norm_cfg=dict(type="SyncBN", requires_grad=True),
    loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
    loss_bbox=dict(type="GIoULoss", loss_weight=10.0),
)
bbox_coder = dict(type="DeltaXYWHBBoxCoder", target_means=[0.0, 0.0, 0.0, 0.0])

model = dict(
    backbone=dict(
        _delete_=True,
        type="mmbivit.BinarySwinTransformer",
        arch="tiny",
        recipe="sibivit",
        spatial_interaction=dict(ratio=1.0),
        mlp_ratio=3,  # 4 without the spatial interaction branch, which it pays for
        window_size=7,
        drop_path_rate=0.0,  # of the official Cascade Mask R-CNN Swin-T, 1x
        out_indices=(0, 1, 2, 3),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
    roi_head=dict(
        bbox_head=[
            dict(**bbox_head, bbox_coder=dict(**bbox_coder, target_stds=[0.1, 0.1, 0.2, 0.2])),
            dict(**bbox_head, bbox_coder=dict(**bbox_coder, target_stds=[0.05, 0.05, 0.1, 0.1])),
            dict(**bbox_head, bbox_coder=dict(**bbox_coder, target_stds=[0.033, 0.033, 0.067, 0.067])),
        ]
    ),
)
del bbox_head, bbox_coder
