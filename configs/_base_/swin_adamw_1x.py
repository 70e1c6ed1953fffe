# The official Swin pipeline, "1x": 12 epochs of 117266 images in batches of 16 (8 GPUs x 2) = 12 x 7330 iterations.
# Learning rate 1e-4 after a warm-up of 500 iterations from 1e-7, 1e-5 from epoch 9 on, 1e-6 in epoch 12. The official
# runs compute in float16: tools/train.py --amp. Other batch sizes: --auto-scale-lr.
_base_ = "mmdet::_base_/schedules/schedule_1x.py"

param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type="MultiStepLR", by_epoch=True, begin=0, end=12, milestones=[8, 11], gamma=0.1),
]

# As in the official pipeline all weights and biases decay, the latent weights of binary layers too (SI-BiViT 4.1.2
# follows it); norms and position biases do not. What only a binary network has is like a norm and does not decay:
# thresholds, learned scales, RPReLU and the balancing factor alpha, which decay would pull to plain sign, to nothing,
# to ReLU and to no branch.
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(
        custom_keys={
            "norm": dict(decay_mult=0.0),
            "relative_position_bias_table": dict(decay_mult=0.0),
            "_quantizer.": dict(decay_mult=0.0),
            "attn.attention.": dict(decay_mult=0.0),
            ".act.": dict(decay_mult=0.0),
            "si.alpha": dict(decay_mult=0.0),
        }
    ),
)
