# SI-BiViT ViT-T on Tiny-ImageNet (Table 2): token mixing over 197 tokens, the class token included.
# Teacher and start are a float network of Tiny-ImageNet: vit_t_tiny_imagenet_float.py.
_base_ = "../../_base_/vit_tiny_imagenet.py"

float_checkpoint = "{{$MMBIVIT_FLOAT_CHECKPOINT:work_dirs/vit_t_tiny_imagenet_float/epoch_300.pth}}"
load_from = float_checkpoint
network = dict(type="mmbivit.BinaryVisionTransformer", arch="tiny", out_type="cls_token")
half = (0.5, 0.5, 0.5)
model = dict(
    data_preprocessor=dict(mean=half, std=half),
    backbone=dict(_delete_=True, recipe="sibivit", mlp_ratio=3, spatial_interaction=dict(ratio=1.0), **network),
)
custom_hooks = _base_.custom_hooks
custom_hooks[0].teacher.backbone = dict(recipe="float", **network)
custom_hooks[0].teacher.init_cfg.checkpoint = float_checkpoint
