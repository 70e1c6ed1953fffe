# The paper's own protocol as in mask_rcnn_sibivit_swin_t_finetune.py, with the values of MMDetection's own
# mask-rcnn_swin-t_fpn_1x, whose float row Table 4 prints.
_base_ = "./mask_rcnn_sibivit_swin_t_mmdet.py"

# No pretrained backbone is public. Give yours with tools/train.py --backbone-checkpoint or the variable named here.
backbone_checkpoint = "{{$MMBIVIT_BACKBONE_CHECKPOINT:none}}"
float_checkpoint = None
load_from = None
custom_hooks = []

# As in configs/classification/sibivit_swin_t_imagenet.py: tiles of the pretraining grid are mixed.
model = dict(
    backbone=dict(
        spatial_interaction=dict(axis="grid"),
        pretrain_img_size=224,
        downsample="float",
        init_cfg=dict(type="Pretrained", checkpoint=backbone_checkpoint, prefix="backbone."),
    )
)
