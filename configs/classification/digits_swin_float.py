# A float Swin of two stages, small enough to learn the cluttered digits on one CPU core in a few minutes.
_base_ = ["../_base_/digit_folders.py", "../_base_/schedule_digit_folders.py"]

arch = dict(embed_dims=32, depths=(2, 2), num_heads=(2, 4))
model = dict(
    type="mmbivit.ImageClassifier",
    num_classes=10,
    label_smoothing=0.1,
    backbone=dict(
        type="mmbivit.BinarySwinTransformer",
        arch=arch,
        recipe="float",
        mlp_ratio=4,
        window_size=4,
        shift_single_window=False,
        drop_path_rate=0.0,
        out_indices=(1,),
    ),
)
