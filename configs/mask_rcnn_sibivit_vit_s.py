# SI-BiViT DeiT-S in Mask R-CNN as in ViTDet: windows of 14 x 14 tokens, four blocks over the whole map, and a simple
# feature pyramid. Student and teacher start from ImageNet's float backbone. Our own protocol.
_base_ = "./mask_rcnn_sibivit_swin_t.py"

float_checkpoint = "{{$MMBIVIT_FLOAT_CHECKPOINT:timm://deit_small_patch16_224.fb_in1k}}"
load_from = None
network = dict(type="mmbivit.BinaryVisionTransformer", arch="small", window_size=14)
network.update(init_cfg=dict(type="Pretrained", checkpoint=float_checkpoint))
model = dict(
    backbone=dict(_delete_=True, recipe="sibivit", mlp_ratio=3, spatial_interaction=dict(ratio=1.0), **network),
    neck=dict(_delete_=True, type="mmbivit.SimpleFeaturePyramid", in_channels=384, out_channels=256, num_outs=5),
)
custom_hooks = _base_.custom_hooks
custom_hooks[0].teacher = dict(recipe="float", **network)
custom_keys = _base_.optim_wrapper.paramwise_cfg.custom_keys
custom_keys["absolute_pos_embed"] = custom_keys.pop("relative_position_bias_table")
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(_delete_=True, **custom_keys)))
