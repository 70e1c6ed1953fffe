# 1000 iterations: 50 of warm-up, then a cosine to 2 %.
_base_ = ["../_base_/mask_rcnn_digits.py", "../_base_/digit_scenes.py", "../_base_/schedule_digits.py"]
max_iters = 1000
train_cfg = dict(type="IterBasedTrainLoop", max_iters=max_iters, val_interval=10**9)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.02, by_epoch=False, begin=0, end=50),
    dict(type="CosineAnnealingLR", eta_min_ratio=0.02, by_epoch=False, begin=50, end=max_iters),
]
