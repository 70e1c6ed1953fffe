# BinaryViT in Mask R-CNN, fine-tuned from a backbone of classification/binaryvit. Our own: the paper has no detector.
_base_ = "./mask_rcnn_sibivit_swin_t_finetune.py"

model = dict(
    backbone=dict(
        _delete_=True, type="mmbivit.BinaryViT", recipe="reactnet", init_cfg={{_base_.model.backbone.init_cfg}}
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
