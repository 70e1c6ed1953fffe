# Swin-S: 18 blocks instead of 6 in the third stage, in student and teacher.
_base_ = "./mask_rcnn_sibivit_swin_t.py"

# mmdet's float Mask R-CNN Swin-S, trained for 36 epochs (48.2 box AP, 43.2 mask AP); there is none for 12.
float_checkpoint = "{{$MMBIVIT_FLOAT_CHECKPOINT:https://download.openmmlab.com/mmdetection/v2.0/swin/mask_rcnn_swin-s-p4-w7_fpn_fp16_ms-crop-3x_coco/mask_rcnn_swin-s-p4-w7_fpn_fp16_ms-crop-3x_coco_20210903_104808-b92c91f1.pth}}"
load_from = float_checkpoint

model = dict(backbone=dict(arch="small", drop_path_rate=0.2))  # of the official Swin-S, 3x
custom_hooks = _base_.custom_hooks
custom_hooks[0].teacher.arch = "small"
custom_hooks[0].teacher.init_cfg.checkpoint = float_checkpoint
