# SI-BiViT NesT-T on ImageNet-1k (Table 3): token mixing over the 196 tokens of a block.
_base_ = "../../_base_/nest_imagenet.py"

float_checkpoint = "{{$MMBIVIT_FLOAT_CHECKPOINT:timm://nest_tiny_jx.goog_in1k}}"
load_from = float_checkpoint
network = dict(type="mmbivit.BinaryNesT", arch="tiny", out_indices=(2,))
model = dict(
    backbone=dict(_delete_=True, recipe="sibivit", mlp_ratio=3, spatial_interaction=dict(ratio=1.0), **network)
)
custom_hooks = _base_.custom_hooks
custom_hooks[0].teacher.backbone = dict(recipe="float", **network)
custom_hooks[0].teacher.init_cfg.checkpoint = float_checkpoint
