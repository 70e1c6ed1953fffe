# Fully binary with spatial interaction from the first of 600 iterations, from the same float weights, no distillation:
# 50 of warm-up, then one cosine to 2 %.
_base_ = "../mask_rcnn_sibivit.py"
custom_hooks = []
param_scheduler = [
    dict(type="LinearLR", start_factor=0.02, by_epoch=False, begin=0, end=50),
    dict(type="CosineAnnealingLR", eta_min_ratio=0.02, by_epoch=False, begin=50, end={{_base_.max_iters}}),
]
