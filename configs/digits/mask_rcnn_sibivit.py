# 600 iterations in two stages, from the float detector's weights: 200 with distillation (warm-up, then a cosine to
# 30 %), 400 fully binary (20 of warm-up after the rates are reset, then a cosine to 2 %).
_base_ = "./mask_rcnn_swin_float.py"
float_checkpoint = "{{$MMBIVIT_FLOAT_CHECKPOINT:work_dirs/mask_rcnn_swin_float/iter_1000.pth}}"
switch_iter, max_iters = 200, 600
model = dict(backbone=dict(recipe="sibivit", mlp_ratio=3, spatial_interaction=dict(ratio=1.0)))
load_from = float_checkpoint
custom_hooks = [
    dict(
        type="mmbivit.DecoupledTrainingHook",
        switch_iter=switch_iter,
        teacher=dict(
            type="mmbivit.BinarySwinTransformer",
            arch={{_base_.arch}},
            recipe="float",
            mlp_ratio=4,
            init_cfg=dict(type="Pretrained", checkpoint=float_checkpoint, prefix="backbone."),
        ),
        distill_loss=dict(type="mmbivit.BlockMSELoss", normalize=True),
        distill_weight=0.1,
        reset_lr=True,
        reset_optimizer=True,
    ),
    dict(type="mmbivit.SignFlipsHook", interval=20),
]
train_cfg = dict(max_iters=max_iters, val_interval=10**9)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.02, by_epoch=False, begin=0, end=50),
    dict(type="CosineAnnealingLR", eta_min_ratio=0.3, by_epoch=False, begin=50, end=switch_iter),
    dict(type="LinearLR", start_factor=0.05, by_epoch=False, begin=switch_iter, end=switch_iter + 20),
    dict(type="CosineAnnealingLR", eta_min_ratio=0.02, by_epoch=False, begin=switch_iter + 20, end=max_iters),
]
