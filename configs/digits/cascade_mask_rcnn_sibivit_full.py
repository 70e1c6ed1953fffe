# A cascade of the digit scenes in 1 bit, neck and heads included. There is no float cascade of them: the float Mask
# R-CNN is the teacher of backbone and neck, and the start of those and of the RPN. Schedule as in mask_rcnn_sibivit.py.
_base_ = "./mask_rcnn_sibivit_full.py"
binary = dict(recipe="sibivit")
bbox_head = dict(
    type="mmbivit.BinaryConvFCBBoxHead",
    num_shared_convs=2,
    num_shared_fcs=1,
    in_channels=64,
    conv_out_channels=64,
    fc_out_channels=256,
    roi_feat_size=7,
    num_classes=10,
    reg_class_agnostic=True,
    loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
    loss_bbox=dict(type="SmoothL1Loss", beta=1.0, loss_weight=1.0),
    binary=binary,
)
bbox_coder = dict(type="DeltaXYWHBBoxCoder", target_means=[0.0, 0.0, 0.0, 0.0])
rcnn = dict(
    assigner=dict(type="MaxIoUAssigner", match_low_quality=False, ignore_iof_thr=-1),
    sampler=dict(type="RandomSampler", num=32, pos_fraction=0.25, neg_pos_ub=-1, add_gt_as_proposals=True),
    mask_size=28,
    pos_weight=-1,
    debug=False,
)
model = dict(
    type="CascadeRCNN",
    roi_head=dict(
        type="CascadeRoIHead",
        num_stages=3,
        stage_loss_weights=[1, 0.5, 0.25],
        bbox_head=[
            dict(**bbox_head, bbox_coder=dict(**bbox_coder, target_stds=[0.1, 0.1, 0.2, 0.2])),
            dict(**bbox_head, bbox_coder=dict(**bbox_coder, target_stds=[0.05, 0.05, 0.1, 0.1])),
            dict(**bbox_head, bbox_coder=dict(**bbox_coder, target_stds=[0.033, 0.033, 0.067, 0.067])),
        ],
    ),
    train_cfg=dict(
        rcnn=[
            {**rcnn, "assigner": dict(pos_iou_thr=iou, neg_iou_thr=iou, min_pos_iou=iou, **rcnn["assigner"])}
            for iou in (0.5, 0.6, 0.7)
        ]
    ),
)
del bbox_head, bbox_coder, rcnn
