# The paper's baseline (4.1.3), which has no spatial interaction: binary weights and float activations first, from
# random parameters and without a teacher; then all binary.
_base_ = "./sibivit_swin_t_tiny_imagenet.py"

float_checkpoint = None
load_from = None
model = dict(backbone=dict(stage1="weights", spatial_interaction=None, mlp_ratio=4))
custom_hooks = _base_.custom_hooks
custom_hooks[0].teacher = None
