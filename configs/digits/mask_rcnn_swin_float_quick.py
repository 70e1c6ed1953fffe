# The float detector of the quick demo: 60 iterations, too few for a useful AP.
_base_ = "./mask_rcnn_swin_float.py"
max_iters = 60
train_cfg = dict(max_iters=max_iters)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.02, by_epoch=False, begin=0, end=10),
    dict(type="CosineAnnealingLR", eta_min_ratio=0.02, by_epoch=False, begin=10, end=max_iters),
]
default_hooks = dict(checkpoint=dict(interval=20), logger=dict(interval=5))
