# ImageNet-1k in its official class folders, with DeiT's augmentation on timm's transforms: random resized crop, flip,
# RandAugment 9/0.5, and per batch (in the model's data_preprocessor) random erasing 0.25, Mixup 0.8 and CutMix 1.0.
# DeiT also repeats each image three times in an epoch: train_dataloader.sampler.type=mmbivit.RepeatAugSampler.
data_root = "data/imagenet"
input_size = 224

train_dataloader = dict(
    batch_size=128,
    num_workers=8,
    persistent_workers=True,
    pin_memory=True,
    drop_last=True,  # Mixup pairs images, so batches are even
    collate_fn=dict(type="default_collate"),
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(
        type="mmbivit.TimmDataset",
        data_root=data_root,
        split="train",
        pipeline=[
            dict(
                type="mmbivit.TimmTransform",
                input_size=input_size,
                is_training=True,
                auto_augment="rand-m9-mstd0.5-inc1",
                interpolation="bicubic",
            )
        ],
    ),
)
val_dataloader = dict(
    batch_size=128,
    num_workers=8,
    persistent_workers=True,
    pin_memory=True,
    collate_fn=dict(type="default_collate"),
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="mmbivit.TimmDataset",
        data_root=data_root,
        split="val",
        pipeline=[
            dict(type="mmbivit.TimmTransform", input_size=input_size, interpolation="bicubic", crop_pct=0.875),
        ],
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="mmbivit.TopKAccuracy", topk=(1, 5))
test_evaluator = val_evaluator
