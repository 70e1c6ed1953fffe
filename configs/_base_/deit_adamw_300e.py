# SI-BiViT 4.1.2: AdamW, weight decay 2e-5, 300 epochs = 150 + 150, cosine with 5 warm-up epochs. In the published code
# stage 2 is a run of its own from the weights of stage 1: a fresh optimizer, 5 warm-up epochs and a cosine again. Here
# reset_lr and reset_optimizer of the hook do that. Learning rate by DeiT's linear rule, 5e-4 x batch / 512: 8 GPUs x
# 128 = 1024 images give 1e-3 (another batch: --auto-scale-lr). The paper does not give the rate's ends; 1e-6 and 1e-5
# are DeiT's.
max_epochs, switch_epoch, warm_up_epochs = 300, 150, 5

# Only matrices decay: no threshold, scale, norm, bias, RPReLU or alpha, which are all flat, and no position bias.
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-3, betas=(0.9, 0.999), weight_decay=2e-5),
    clip_grad=dict(max_norm=5.0),  # as in Swin
    paramwise_cfg=dict(
        flat_decay_mult=0.0,
        custom_keys={"relative_position_bias_table": dict(decay_mult=0.0)},
    ),
)
param_scheduler = []
for begin, end in ((0, switch_epoch), (switch_epoch, max_epochs)):
    warm = begin + warm_up_epochs
    param_scheduler += [
        dict(type="LinearLR", start_factor=1e-3, begin=begin, end=warm, convert_to_iter_based=True),
        dict(type="CosineAnnealingLR", eta_min=1e-5, begin=warm, end=end, convert_to_iter_based=True),
    ]
del begin, end, warm
auto_scale_lr = dict(enable=False, base_batch_size=1024)
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=max_epochs, val_interval=1)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
