# BiBERT's losses, by its published code: directions of queries, keys, values and hidden states, and soft cross-entropy
# with the teacher, all alike. Its schedule is of language; this one is SI-BiViT's optimizer with a single cosine.
method = dict(
    model=dict(backbone=dict(recipe="bibert", training_stages=[])),
    hook=dict(
        switch_epoch=[],
        distill_loss=[
            dict(type="mmbivit.DirectionMatchingLoss", of="qkv"),
            dict(type="mmbivit.DirectionMatchingLoss", of="blocks"),
            dict(type="mmbivit.SoftCrossEntropyLoss"),
        ],
        task_weight=0.0,
    ),
    optim_wrapper={},
    param_scheduler=[
        dict(type="LinearLR", start_factor=1e-3, begin=0, end=5, convert_to_iter_based=True),
        dict(type="CosineAnnealingLR", eta_min=1e-5, begin=5, end=300, convert_to_iter_based=True),
    ],
    train_dataloader={},
    auto_scale_lr={},
)
