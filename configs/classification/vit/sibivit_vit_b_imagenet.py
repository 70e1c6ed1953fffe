# SI-BiViT ViT-B on ImageNet-1k (Table 3): as ViT-S.
_base_ = "./sibivit_vit_s_imagenet.py"

float_checkpoint = "{{$MMBIVIT_FLOAT_CHECKPOINT:timm://vit_base_patch16_224.augreg_in21k_ft_in1k}}"
load_from = float_checkpoint
model = dict(backbone=dict(arch="base"))
custom_hooks = _base_.custom_hooks
custom_hooks[0].teacher.backbone.arch = "base"
custom_hooks[0].teacher.init_cfg.checkpoint = float_checkpoint
