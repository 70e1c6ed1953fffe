# SI-BiViT in the quick demo: 60 iterations, 25 of them in stage 1, too few for a useful AP.
_base_ = "./mask_rcnn_sibivit.py"
switch_iter, max_iters = 25, 60
train_cfg = dict(max_iters=max_iters)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.02, by_epoch=False, begin=0, end=10),
    dict(type="CosineAnnealingLR", eta_min_ratio=0.3, by_epoch=False, begin=10, end=switch_iter),
    dict(type="CosineAnnealingLR", eta_min_ratio=0.02, by_epoch=False, begin=switch_iter, end=max_iters),
]
custom_hooks = _base_.custom_hooks
custom_hooks[0].switch_iter = switch_iter
custom_hooks[1].interval = 5
default_hooks = dict(checkpoint=dict(interval=20), logger=dict(interval=5))
