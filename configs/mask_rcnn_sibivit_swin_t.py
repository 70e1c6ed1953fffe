# SI-BiViT Swin-T in Mask R-CNN, trained in two stages with the float detector's backbone as teacher. Our own protocol:
# the paper fine-tunes a binary backbone that was pretrained on ImageNet (mask_rcnn_sibivit_swin_t_finetune.py).
# 12 epochs = 6 (binary activations, float weights, distillation) + 6 (all binary, spatial interaction) with the values
# of the official Swin; both steps of the learning rate, at 8 and 11, fall into stage 2.
_base_ = [
    "./_base_/mask_rcnn_sibivit_swin_t.py",
    "./_base_/coco_instance_ms_crop.py",
    "./_base_/swin_adamw_1x.py",
    "./_base_/runtime.py",
]

# The official float Mask R-CNN Swin-T, 1x (43.7 box AP, 39.8 mask AP). The student starts from all of it, heads
# included. Another file or URL: tools/train.py --float-checkpoint, or the variable named here.
float_checkpoint = "{{$MMBIVIT_FLOAT_CHECKPOINT:https://github.com/SwinTransformer/storage/releases/download/v1.0.3/mask_rcnn_swin_tiny_patch4_window7_1x.pth}}"
load_from = float_checkpoint

# The teacher is our own float Swin (equal to mmdet's), as it takes the keys of mmdet, timm and the official Swin.
custom_hooks = [
    dict(
        type="mmbivit.DecoupledTrainingHook",
        switch_epoch=6,
        teacher=dict(
            type="mmbivit.BinarySwinTransformer",
            arch="tiny",
            recipe="float",
            init_cfg=dict(type="Pretrained", checkpoint=float_checkpoint, prefix="backbone."),
        ),
        distill_weight=1.0,
        reset_optimizer=True,  # measured on digits: docs/experiments.md
    )
]
