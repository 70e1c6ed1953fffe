# SI-BiViT Swin-T on ImageNet-1k: 150 epochs of binary activations, float weights and distillation, 150 of all binary.
_base_ = [
    "../_base_/classifier_sibivit_swin_t.py",
    "../_base_/imagenet.py",
    "../_base_/deit_adamw_300e.py",
    "../_base_/classification_runtime.py",
]

# The float Swin-T that is teacher and start, head included: timm's copy of the official weights. A file
# of timm, official or mmdet keys, or another timm name: tools/train.py --float-checkpoint, or the variable named here.
float_checkpoint = "{{$MMBIVIT_FLOAT_CHECKPOINT:timm://swin_tiny_patch4_window7_224.ms_in1k}}"
load_from = float_checkpoint

custom_hooks = [
    dict(
        type="mmbivit.DecoupledTrainingHook",
        switch_epoch={{_base_.switch_epoch}},
        teacher=dict(
            type="mmbivit.ImageClassifier",  # whose head is there for losses that compare logits
            num_classes=1000,
            backbone=dict(
                type="mmbivit.BinarySwinTransformer",
                arch="tiny",
                recipe="float",
                shift_single_window=False,
                out_indices=(3,),
            ),
            init_cfg=dict(type="Pretrained", checkpoint=float_checkpoint),
        ),
        distill_weight=1.0,
        reset_lr=True,
        reset_optimizer=True,
    )
]
