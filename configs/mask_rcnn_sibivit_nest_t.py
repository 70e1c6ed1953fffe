# SI-BiViT NesT-T in Mask R-CNN, the three resolutions of NesT and two pooled ones. Student and teacher start from
# ImageNet's float backbone. Our own protocol.
_base_ = "./mask_rcnn_sibivit_swin_t.py"

float_checkpoint = "{{$MMBIVIT_FLOAT_CHECKPOINT:timm://nest_tiny_jx.goog_in1k}}"
load_from = None
network = dict(type="mmbivit.BinaryNesT", arch="tiny")
network.update(init_cfg=dict(type="Pretrained", checkpoint=float_checkpoint))
model = dict(
    backbone=dict(_delete_=True, recipe="sibivit", mlp_ratio=3, spatial_interaction=dict(ratio=1.0), **network),
    neck=dict(in_channels=[96, 192, 384]),
)
custom_hooks = _base_.custom_hooks
custom_hooks[0].teacher = dict(recipe="float", **network)
custom_keys = _base_.optim_wrapper.paramwise_cfg.custom_keys
custom_keys["pos_embed"] = custom_keys.pop("relative_position_bias_table")
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(_delete_=True, **custom_keys)))
