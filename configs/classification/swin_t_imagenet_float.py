# The float Swin-T from random weights, for comparison and as a teacher of one's own: one cosine over all 300 epochs and
# the weight decay of DeiT and Swin, since SI-BiViT's is for binary networks.
_base_ = "./sibivit_swin_t_imagenet.py"

float_checkpoint = None
load_from = None
custom_hooks = []
find_unused_parameters = False
model = dict(backbone=dict(recipe="float", spatial_interaction=None, mlp_ratio=4))
optim_wrapper = dict(optimizer=dict(weight_decay=0.05))
param_scheduler = _base_.param_scheduler[:2]
param_scheduler[1].end = _base_.max_epochs
