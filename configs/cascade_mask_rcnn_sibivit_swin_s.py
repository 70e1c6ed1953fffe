# Swin-S: 18 blocks instead of 6 in the third stage, in student and teacher.
_base_ = "./cascade_mask_rcnn_sibivit_swin_t.py"

# The official float Cascade Mask R-CNN Swin-S, trained for 36 epochs (51.9 box AP, 45.0 mask AP); there is none for 12.
float_checkpoint = "{{$MMBIVIT_FLOAT_CHECKPOINT:https://github.com/SwinTransformer/storage/releases/download/v1.0.2/cascade_mask_rcnn_swin_small_patch4_window7.pth}}"
load_from = float_checkpoint

model = dict(backbone=dict(arch="small", drop_path_rate=0.2))  # of the official Swin-S, 3x
custom_hooks = _base_.custom_hooks
custom_hooks[0].teacher.arch = "small"
custom_hooks[0].teacher.init_cfg.checkpoint = float_checkpoint
