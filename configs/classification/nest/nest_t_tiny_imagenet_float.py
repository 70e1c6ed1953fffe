# The float NesT-T on Tiny-ImageNet, from ImageNet's float backbone, trained as swin_t_tiny_imagenet_float.py:
# the teacher of sibivit_nest_t_tiny_imagenet.py.
_base_ = "./sibivit_nest_t_tiny_imagenet.py"

float_checkpoint = "{{$MMBIVIT_FLOAT_CHECKPOINT:timm://nest_tiny_jx.goog_in1k}}"
load_from = None
custom_hooks = []
find_unused_parameters = False
pretrained = dict(type="Pretrained", checkpoint=float_checkpoint)
model = dict(backbone=dict(recipe="float", spatial_interaction=None, mlp_ratio=4, init_cfg=pretrained))
optim_wrapper = dict(optimizer=dict(weight_decay=0.05))
param_scheduler = _base_.param_scheduler[:2]
param_scheduler[1].end = _base_.max_epochs
