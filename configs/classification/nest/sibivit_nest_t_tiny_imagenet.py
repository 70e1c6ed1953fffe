# SI-BiViT NesT-T on Tiny-ImageNet (Table 2): token mixing over the 196 tokens of a block.
# Teacher and start are a float network of Tiny-ImageNet: nest_t_tiny_imagenet_float.py.
_base_ = "../../_base_/nest_tiny_imagenet.py"

float_checkpoint = "{{$MMBIVIT_FLOAT_CHECKPOINT:work_dirs/nest_t_tiny_imagenet_float/epoch_300.pth}}"
load_from = float_checkpoint
network = dict(type="mmbivit.BinaryNesT", arch="tiny", out_indices=(2,))
model = dict(
    backbone=dict(_delete_=True, recipe="sibivit", mlp_ratio=3, spatial_interaction=dict(ratio=1.0), **network)
)
custom_hooks = _base_.custom_hooks
custom_hooks[0].teacher.backbone = dict(recipe="float", **network)
custom_hooks[0].teacher.init_cfg.checkpoint = float_checkpoint
