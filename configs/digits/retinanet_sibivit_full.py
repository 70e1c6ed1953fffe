# A single-stage detector of the digit scenes in 1 bit, neck and dense head included. There is no float RetinaNet of
# them: backbone and neck of the float Mask R-CNN are the teacher and the start. Schedule as in mask_rcnn_sibivit.py.
_base_ = "./mask_rcnn_sibivit_full.py"
binary = dict(recipe="sibivit")
model = dict(
    _delete_=True,
    type="RetinaNet",
    data_preprocessor={{_base_.model.data_preprocessor}},
    backbone={{_base_.model.backbone}},
    neck={{_base_.model.neck}},
    bbox_head=dict(
        type="mmbivit.BinaryRetinaHead",
        num_classes=10,
        in_channels=64,
        feat_channels=64,
        stacked_convs=2,
        anchor_generator=dict(
            type="AnchorGenerator",
            octave_base_scale=3,
            scales_per_octave=2,
            ratios=[0.5, 1.0, 2.0],
            strides=[4, 8, 16, 32],
        ),
        binary=binary,
    ),
    train_cfg=dict(
        assigner=dict(type="MaxIoUAssigner", pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0, ignore_iof_thr=-1),
        sampler=dict(type="PseudoSampler"),
        allowed_border=-1,
        pos_weight=-1,
    ),
    test_cfg=dict(
        nms_pre=300, min_bbox_size=0, score_thr=0.05, nms=dict(type="nms", iou_threshold=0.5), max_per_img=100
    ),
)
val_evaluator = dict(metric="bbox")
test_evaluator = val_evaluator
optim_wrapper = dict(
    paramwise_cfg=dict(
        custom_keys=dict(
            _delete_=True, fpn_convs=dict(lr_mult=5.0), cls_convs=dict(lr_mult=5.0), reg_convs=dict(lr_mult=5.0)
        )
    )
)
