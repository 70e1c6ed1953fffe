# Mask R-CNN with mmdet's own heads (those of its mask-rcnn_swin-t), on the binary backbone.
_base_ = "mmdet::_base_/models/mask-rcnn_r50_fpn.py"

model = dict(
    backbone=dict(
        _delete_=True,
        type="mmbivit.BinarySwinTransformer",
        arch="tiny",
        recipe="sibivit",
        spatial_interaction=dict(ratio=1.0),
        mlp_ratio=3,  # 4 without the spatial interaction branch, which it pays for
        window_size=7,
        drop_path_rate=0.1,  # of the official Mask R-CNN Swin-T, 1x
        out_indices=(0, 1, 2, 3),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
