# Swin-S: 18 blocks instead of 6 in the third stage, in student and teacher.
_base_ = "./sibivit_swin_t_tiny_imagenet.py"

float_checkpoint = "{{$MMBIVIT_FLOAT_CHECKPOINT:timm://swin_small_patch4_window7_224.ms_in1k}}"
model = dict(backbone=dict(arch="small", init_cfg=dict(checkpoint=float_checkpoint)))
custom_hooks = _base_.custom_hooks
custom_hooks[0].teacher.arch = "small"
custom_hooks[0].teacher.init_cfg.checkpoint = float_checkpoint
