# SI-BiViT DeiT-B on ImageNet-1k, without distillation token, as in other papers.
_base_ = "../../_base_/vit_imagenet.py"

float_checkpoint = "{{$MMBIVIT_FLOAT_CHECKPOINT:timm://deit_base_patch16_224.fb_in1k}}"
load_from = float_checkpoint
network = dict(type="mmbivit.BinaryVisionTransformer", arch="base", out_type="cls_token")
model = dict(
    backbone=dict(_delete_=True, recipe="sibivit", mlp_ratio=3, spatial_interaction=dict(ratio=1.0), **network)
)
custom_hooks = _base_.custom_hooks
custom_hooks[0].teacher.backbone = dict(recipe="float", **network)
custom_hooks[0].teacher.init_cfg.checkpoint = float_checkpoint
