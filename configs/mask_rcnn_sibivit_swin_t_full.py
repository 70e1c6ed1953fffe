# The whole Mask R-CNN in 1 bit: FPN's 3 x 3 convolutions, RPN, box head and mask head, too. Float stay FPN's 1 x 1
# convolutions, the transposed convolution of masks, the small second linear layer of the box head and the last layer of
# each head. Fewer parts: tools/train.py --binary-parts neck rpn mask. Stages, schedule and start as in
# mask_rcnn_sibivit_swin_t.py; the teacher is the whole float detector, whose neck is distilled beside the blocks.
_base_ = "./mask_rcnn_sibivit_swin_t.py"
binary = dict(recipe="sibivit")
model = dict(
    neck=dict(type="mmbivit.BinaryFPN", binary=binary),
    rpn_head=dict(type="mmbivit.BinaryRPNHead", binary=binary),
    roi_head=dict(
        bbox_head=dict(
            type="mmbivit.BinaryConvFCBBoxHead", num_shared_fcs=2, binary=dict(**binary, last_fc_channels=256)
        ),
        mask_head=dict(type="mmbivit.BinaryFCNMaskHead", binary=binary),
    ),
)
custom_hooks = [
    dict(
        type="mmbivit.DecoupledTrainingHook",
        switch_epoch=6,
        teacher=dict(
            type="mmdet.MaskRCNN",
            backbone=dict(type="mmbivit.BinarySwinTransformer", arch="tiny", recipe="float"),
            neck={{_base_.model.neck}},
            rpn_head={{_base_.model.rpn_head}},
            roi_head={{_base_.model.roi_head}},
            train_cfg=None,
            test_cfg={{_base_.model.test_cfg}},
            init_cfg=dict(type="Pretrained", checkpoint={{_base_.float_checkpoint}}),
        ),
        distill_loss=[dict(type="mmbivit.BlockMSELoss"), dict(type="mmbivit.DetectorMSELoss", of="neck", weight=0.1)],
        distill_weight=1.0,
        reset_optimizer=True,  # measured on digits: docs/experiments.md
    )
]
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={"shortcut_scale": dict(decay_mult=0.0)}))
