# The whole Mask R-CNN in 1 bit: FPN's 3 x 3 convolutions, RPN, box head and mask head, too. Float stay FPN's 1 x 1
# convolutions, the transposed convolution of masks and the last layer of each head. Fewer parts: tools/train.py
# --binary-parts neck rpn mask. Stages, schedule and start as in mask_rcnn_sibivit_swin_t.py.
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
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={"shortcut_scale": dict(decay_mult=0.0)}))
