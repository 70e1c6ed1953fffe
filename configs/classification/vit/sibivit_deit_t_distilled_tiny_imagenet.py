# SI-BiViT DeiT-T on Tiny-ImageNet (Table 2): token mixing over 198 tokens, class and distillation token included.
# Teacher and start are a float network of Tiny-ImageNet: deit_t_distilled_tiny_imagenet_float.py.
_base_ = "../../_base_/vit_tiny_imagenet.py"

float_checkpoint = "{{$MMBIVIT_FLOAT_CHECKPOINT:work_dirs/deit_t_distilled_tiny_imagenet_float/epoch_300.pth}}"
load_from = float_checkpoint
network = dict(type="mmbivit.BinaryVisionTransformer", arch="tiny", out_type="cls_token", distillation_token=True)
model = dict(
    backbone=dict(_delete_=True, recipe="sibivit", mlp_ratio=3, spatial_interaction=dict(ratio=1.0), **network)
)
custom_hooks = _base_.custom_hooks
custom_hooks[0].teacher.backbone = dict(recipe="float", **network)
custom_hooks[0].teacher.init_cfg.checkpoint = float_checkpoint
