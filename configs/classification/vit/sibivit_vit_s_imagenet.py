# SI-BiViT ViT-S on ImageNet-1k (Table 3): token mixing over 197 tokens, the class token included.
# Which of timm's float weights the paper takes is not said; images are scaled as these want them.
_base_ = "../../_base_/vit_imagenet.py"

float_checkpoint = "{{$MMBIVIT_FLOAT_CHECKPOINT:timm://vit_small_patch16_224.augreg_in21k_ft_in1k}}"
load_from = float_checkpoint
network = dict(type="mmbivit.BinaryVisionTransformer", arch="small", out_type="cls_token")
half = (0.5, 0.5, 0.5)
model = dict(
    data_preprocessor=dict(mean=half, std=half),
    backbone=dict(_delete_=True, recipe="sibivit", mlp_ratio=3, spatial_interaction=dict(ratio=1.0), **network),
)
custom_hooks = _base_.custom_hooks
custom_hooks[0].teacher.backbone = dict(recipe="float", **network)
custom_hooks[0].teacher.init_cfg.checkpoint = float_checkpoint
