_base_ = ["../sibivit_swin_t_tiny_imagenet.py", "../../_base_/methods/bivit.py"]

model = dict(backbone=dict(recipe=_base_.method.recipe, training_stages=_base_.method.training_stages))
optim_wrapper = dict(optimizer=_base_.method.optimizer)
param_scheduler = _base_.method.param_scheduler
train_dataloader = dict(batch_size=_base_.method.batch_size // 8)  # on each of 8 GPUs
auto_scale_lr = dict(base_batch_size=_base_.method.batch_size)
custom_hooks = _base_.custom_hooks
custom_hooks[0].update(_base_.method.hook)
