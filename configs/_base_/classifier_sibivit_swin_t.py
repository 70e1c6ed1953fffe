# SI-BiViT Swin-T with a float linear head. The token mixing spans the whole feature map and patch merging is float, as
# the operation counts of the paper have it (docs/fidelity.md).
model = dict(
    type="mmbivit.ImageClassifier",
    num_classes=1000,
    label_smoothing=0.1,
    data_preprocessor=dict(
        type="mmbivit.ClassificationPreprocessor",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        non_blocking=True,
        mixup=dict(mixup_alpha=0.8, cutmix_alpha=1.0),
        random_erasing=dict(probability=0.25, mode="pixel"),
    ),
    backbone=dict(
        type="mmbivit.BinarySwinTransformer",
        arch="tiny",
        recipe="sibivit",
        spatial_interaction=dict(ratio=1.0, axis="grid"),
        pretrain_img_size=224,
        downsample="float",
        mlp_ratio=3,  # 4 without the spatial interaction branch, which it pays for
        window_size=7,
        shift_single_window=False,  # as in timm; feature maps of detectors are larger than a window
        drop_path_rate=0.1,  # as in DeiT
        out_indices=(3,),
    ),
)
