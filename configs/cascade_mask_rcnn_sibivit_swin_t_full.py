# The whole Cascade Mask R-CNN in 1 bit, as mask_rcnn_sibivit_swin_t_full.py. The norms of the float box heads give the
# binary ones their start.
_base_ = "./cascade_mask_rcnn_sibivit_swin_t.py"
binary = dict(recipe="sibivit")
model = _base_.model
model.neck.update(type="mmbivit.BinaryFPN", binary=binary)
model.rpn_head.update(type="mmbivit.BinaryRPNHead", binary=binary)
for box_head in model.roi_head.bbox_head:
    box_head.update(type="mmbivit.BinaryConvFCBBoxHead", binary=binary)
model.roi_head.mask_head.update(type="mmbivit.BinaryFCNMaskHead", binary=binary)
del box_head
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={"shortcut_scale": dict(decay_mult=0.0)}))
