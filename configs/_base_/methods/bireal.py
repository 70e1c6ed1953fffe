# Bi-Real Net as Bi-ViT compares with it (5.1): from float weights, 300 epochs of LAMB with 5e-4 at batch 512, no weight
# decay, no warm-up; half the loss is cross-entropy with the teacher's top class, as in DeiT, on which it is built. That
# the rate falls as a cosine is DeiT's, too.
method = dict(
    model=dict(backbone=dict(recipe="bireal", training_stages=[])),
    hook=dict(switch_epoch=[], distill_loss=dict(type="mmbivit.HardCrossEntropyLoss", weight=0.5), task_weight=0.5),
    optim_wrapper=dict(optimizer=dict(type="timm.optim.Lamb", lr=5e-4, weight_decay=0.0)),
    param_scheduler=[dict(type="CosineAnnealingLR", begin=0, end=300, convert_to_iter_based=True)],
    train_dataloader=dict(batch_size=64),  # on each of 8 GPUs
    auto_scale_lr=dict(base_batch_size=512),
)
