# Cluttered digits of 32 x 32 pixels (tools/make_digit_scenes.py --layout folders). No flips: a mirrored digit is
# another shape. Decoding such images takes less than handing them over from worker processes.
data_root = "data/digits"
data_hint = "python tools/make_digit_scenes.py --layout folders --out data/digits"
input_size = 32

train_dataloader = dict(
    batch_size=64,
    num_workers=0,
    drop_last=True,
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
                scale=(0.8, 1.0),
                ratio=(0.9, 1.1),
                hflip=0.0,
                color_jitter=None,
                interpolation="bilinear",
            )
        ],
    ),
)
val_dataloader = dict(
    batch_size=200,
    num_workers=0,
    collate_fn=dict(type="default_collate"),
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="mmbivit.TimmDataset",
        data_root=data_root,
        split="val",
        pipeline=[dict(type="mmbivit.TimmTransform", input_size=input_size, crop_pct=1.0, interpolation="bilinear")],
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="mmbivit.TopKAccuracy", topk=(1,))
test_evaluator = val_evaluator
