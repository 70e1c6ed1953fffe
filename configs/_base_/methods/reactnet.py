# BinaryViT's baseline (its section 2 and Appendix A): soft cross-entropy with the teacher alone, 300 epochs of Adam
# with 5e-4 at batch 512, a cosine without warm-up, no weight decay. Crops and flips are all of its augmentation.
method = dict(
    model=dict(
        backbone=dict(recipe="reactnet", training_stages=[], drop_path_rate=0.0),
        data_preprocessor=dict(mixup=None, random_erasing=None),
        label_smoothing=0.0,
    ),
    hook=dict(switch_epoch=[], distill_loss=dict(type="mmbivit.SoftCrossEntropyLoss"), task_weight=0.0),
    optim_wrapper=dict(optimizer=dict(type="Adam", lr=5e-4, weight_decay=0.0)),
    param_scheduler=[dict(type="CosineAnnealingLR", begin=0, end=300, convert_to_iter_based=True)],
    train_dataloader=dict(
        batch_size=64,  # on each of 8 GPUs
        dataset=dict(
            pipeline=[
                dict(
                    type="mmbivit.TimmTransform",
                    input_size=224,
                    is_training=True,
                    color_jitter=None,
                    interpolation="bicubic",
                )
            ]
        ),
    ),
    auto_scale_lr=dict(base_batch_size=512),
)
