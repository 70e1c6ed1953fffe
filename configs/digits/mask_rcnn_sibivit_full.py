# SI-BiViT with binary neck and heads, too: everything but FPN's 1 x 1 convolutions, the transposed convolution of masks
# and the last layers. Stages, schedule and start as in mask_rcnn_sibivit.py; the teacher is the whole float detector,
# whose neck is distilled beside the blocks.
_base_ = "./mask_rcnn_sibivit.py"
binary = dict(recipe="sibivit")
model = dict(
    neck=dict(type="mmbivit.BinaryFPN", binary=binary),
    rpn_head=dict(type="mmbivit.BinaryRPNHead", binary=binary),
    roi_head=dict(
        bbox_head=dict(
            type="mmbivit.BinaryConvFCBBoxHead", num_shared_fcs=2, binary=dict(**binary, last_fc_channels=64)
        ),
        mask_head=dict(type="mmbivit.BinaryFCNMaskHead", binary=binary),
    ),
)
custom_hooks = [
    dict(
        type="mmbivit.DecoupledTrainingHook",
        switch_iter={{_base_.switch_iter}},
        teacher=dict(
            type="mmdet.MaskRCNN",
            backbone=dict(type="mmbivit.BinarySwinTransformer", arch={{_base_.arch}}, recipe="float", mlp_ratio=4),
            neck={{_base_.model.neck}},
            rpn_head={{_base_.model.rpn_head}},
            roi_head={{_base_.model.roi_head}},
            train_cfg=None,
            test_cfg={{_base_.model.test_cfg}},
            init_cfg=dict(type="Pretrained", checkpoint={{_base_.float_checkpoint}}),
        ),
        distill_loss=[
            dict(type="mmbivit.BlockMSELoss", normalize=True),
            dict(type="mmbivit.DetectorMSELoss", of="neck"),
        ],
        distill_weight=0.1,
        reset_lr=True,
        reset_optimizer=True,
    ),
    dict(type="mmbivit.SignFlipsHook", interval=20),
]
# Convolutions with binary weights move faster: the steps of latent weights have to reach their sign.
optim_wrapper = dict(
    paramwise_cfg=dict(
        custom_keys={
            "fpn_convs": dict(lr_mult=5.0),
            "rpn_conv": dict(lr_mult=5.0),
            ".convs.": dict(lr_mult=5.0),
        }
    )
)
