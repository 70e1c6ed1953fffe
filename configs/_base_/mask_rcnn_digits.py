# A Mask R-CNN small enough to learn the digit scenes on two CPU cores: narrow neck and heads, few RoIs, and anchors
# of 12 to 96 pixels. RoIAlign takes one sample a bin, as its backward pass is slow on CPUs.
_base_ = "mmdet::_base_/models/mask-rcnn_r50_fpn.py"
arch = dict(embed_dims=32, depths=(2, 2, 2, 2), num_heads=(2, 4, 8, 8))
roi_layer = dict(type="RoIAlign", sampling_ratio=1)
model = dict(
    data_preprocessor=dict(pad_size_divisor=1),
    backbone=dict(
        _delete_=True, type="mmbivit.BinarySwinTransformer", arch=arch, recipe="float", mlp_ratio=4, drop_path_rate=0.0
    ),
    neck=dict(in_channels=[32, 64, 128, 256], out_channels=64, num_outs=4),
    rpn_head=dict(in_channels=64, feat_channels=64, anchor_generator=dict(scales=[3], strides=[4, 8, 16, 32])),
    roi_head=dict(
        bbox_roi_extractor=dict(roi_layer=roi_layer, out_channels=64, finest_scale=28),
        bbox_head=dict(in_channels=64, fc_out_channels=256, num_classes=10),
        mask_roi_extractor=dict(roi_layer=roi_layer, out_channels=64, finest_scale=28),
        mask_head=dict(in_channels=64, conv_out_channels=64, num_classes=10),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=128)),
        rpn_proposal=dict(nms_pre=300, max_per_img=200),
        rcnn=dict(sampler=dict(num=32)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=300, max_per_img=200)),
)
