# BiViT, NesT-T of SI-BiViT's Table 2.
_base_ = ["./sibivit_nest_t_tiny_imagenet.py", "../../_base_/methods/bivit.py"]

model = _base_.method.model
model.backbone.update(spatial_interaction=None, mlp_ratio=4)
optim_wrapper = _base_.method.optim_wrapper
param_scheduler = _base_.method.param_scheduler
train_dataloader = _base_.method.train_dataloader
auto_scale_lr = _base_.method.auto_scale_lr
custom_hooks = _base_.custom_hooks
custom_hooks[0].update(_base_.method.hook)
