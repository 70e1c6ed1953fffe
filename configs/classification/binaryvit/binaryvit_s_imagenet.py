# BinaryViT on ImageNet-1k, as in its Appendix A: 300 epochs of Adam, crops and flips, soft cross-entropy with a DeiT-S.
_base_ = ["../vit/sibivit_deit_s_imagenet.py", "../../_base_/methods/reactnet.py"]

load_from = None
model = _base_.method.model
model.backbone = dict(_delete_=True, type="mmbivit.BinaryViT", recipe="reactnet", training_stages=[], out_indices=(3,))
optim_wrapper = _base_.method.optim_wrapper
param_scheduler = _base_.method.param_scheduler
train_dataloader = _base_.method.train_dataloader
auto_scale_lr = _base_.method.auto_scale_lr
custom_hooks = _base_.custom_hooks
custom_hooks[0].update(_base_.method.hook)
