# SI-BiViT Swin-T in Mask R-CNN, trained in two stages with the float detector's backbone as teacher.
# 12 epochs = 6 (binary activations, float weights, distillation) + 6 (all binary, spatial interaction); the learning
# rate is that of the official 1x schedule throughout, so its steps at 8 and 11 both fall into stage 2.
_base_ = [
    "./_base_/mask_rcnn_sibivit_swin_t.py",
    "./_base_/coco_instance_ms_crop.py",
    "./_base_/swin_adamw_1x.py",
    "./_base_/runtime.py",
]

# A float Mask R-CNN Swin-T; its 42.7 box AP and 39.3 mask AP are the float row of SI-BiViT, Table 4. The student starts
# from all of it, heads included. Another file or URL: tools/train.py --float-checkpoint, or the variable named here.
float_checkpoint = "{{$MMBIVIT_FLOAT_CHECKPOINT:https://download.openmmlab.com/mmdetection/v2.0/swin/mask_rcnn_swin-t-p4-w7_fpn_1x_coco/mask_rcnn_swin-t-p4-w7_fpn_1x_coco_20210902_120937-9d6b7cfa.pth}}"
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
    )
]
