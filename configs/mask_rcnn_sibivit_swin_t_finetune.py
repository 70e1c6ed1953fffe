# The paper's own protocol (4.1.2): a SI-BiViT backbone, pretrained on ImageNet in both stages, is fine-tuned for 12
# epochs with the official Swin's values, as it is, fully binary and without a teacher; neck and heads start at random.
_base_ = "./mask_rcnn_sibivit_swin_t.py"

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
