# A `bibert` backbone without spatial interaction, pretrained on ImageNet, fine-tuned as SI-BiViT's Table 4 compares it.
_base_ = "./mask_rcnn_sibivit_swin_t_finetune.py"

model = dict(backbone=dict(recipe="bibert", spatial_interaction=None, mlp_ratio=4))
