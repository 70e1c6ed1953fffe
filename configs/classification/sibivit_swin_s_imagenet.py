# Swin-S: 18 blocks instead of 6 in the third stage, in student and teacher.
_base_ = "./sibivit_swin_t_imagenet.py"

float_checkpoint = "{{$MMBIVIT_FLOAT_CHECKPOINT:timm://swin_small_patch4_window7_224.ms_in1k}}"
load_from = float_checkpoint
model = dict(backbone=dict(arch="small"))
custom_hooks = _base_.custom_hooks
custom_hooks[0].teacher.backbone.arch = "small"
custom_hooks[0].teacher.init_cfg.checkpoint = float_checkpoint
