# 28 epochs: 2 of warm-up, then a cosine to 1 %. No weight decay, as on digit scenes.
_base_ = "./classification_runtime.py"

max_epochs = 28
optim_wrapper = dict(
    type="OptimWrapper", optimizer=dict(type="AdamW", lr=2e-3, weight_decay=0.0, fused=True), clip_grad=dict(max_norm=5)
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, begin=0, end=2, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min_ratio=0.01, begin=2, end=max_epochs, convert_to_iter_based=True),
]
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=max_epochs, val_interval=2)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
default_hooks = dict(checkpoint=dict(interval=2, max_keep_ckpts=1))
