# Bi-ViT, DeiT-S of Bi-ViT's Table 2, with the norms of queries and keys that its code has for DeiT.
_base_ = ["./sibivit_deit_s_imagenet.py", "../../_base_/methods/bi_vit.py"]

model = _base_.method.model
model.backbone.update(spatial_interaction=None, mlp_ratio=4, recipe=dict(_delete_=True, base="bi-vit", head_norm=True))
optim_wrapper = _base_.method.optim_wrapper
param_scheduler = _base_.method.param_scheduler
train_dataloader = _base_.method.train_dataloader
auto_scale_lr = _base_.method.auto_scale_lr
custom_hooks = _base_.custom_hooks
custom_hooks[0].update(_base_.method.hook)
