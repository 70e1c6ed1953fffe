# BinaryViT's baseline (its section 2 and Appendix A): soft cross-entropy with the teacher alone, 300 epochs of Adam
# with 5e-4 at batch 512, a cosine without warm-up, no weight decay. Crops and flips are all of its augmentation.
method = dict(
    recipe="reactnet",
    training_stages=[],
    hook=dict(switch_epoch=[], distill_loss=dict(type="mmbivit.SoftCrossEntropyLoss"), task_weight=0.0),
    optimizer=dict(type="Adam", lr=5e-4, weight_decay=0.0),
    param_scheduler=[dict(type="CosineAnnealingLR", begin=0, end=300, convert_to_iter_based=True)],
    batch_size=512,
)
