# The whole Cascade Mask R-CNN in 1 bit, as mask_rcnn_sibivit_swin_t_full.py. The norms of the float box heads give the
# binary ones their start. The teacher is the whole float detector, whose neck is distilled beside the blocks.
_base_ = "./cascade_mask_rcnn_sibivit_swin_t.py"
binary = dict(recipe="sibivit")
box_heads = [dict(head, type="mmbivit.BinaryConvFCBBoxHead", binary=binary) for head in _base_.model.roi_head.bbox_head]
model = dict(
    neck=dict(type="mmbivit.BinaryFPN", binary=binary),
    rpn_head=dict(type="mmbivit.BinaryRPNHead", binary=binary),
    roi_head=dict(bbox_head=box_heads, mask_head=dict(type="mmbivit.BinaryFCNMaskHead", binary=binary)),
)
custom_hooks = [
    dict(
        type="mmbivit.DecoupledTrainingHook",
        switch_epoch=6,
        teacher=dict(
            type="mmdet.CascadeRCNN",
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
del box_heads
