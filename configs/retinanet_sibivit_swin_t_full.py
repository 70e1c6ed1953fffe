# The whole RetinaNet in 1 bit but for FPN's 1 x 1 convolutions and the last layers. Stages, schedule and start as in
# retinanet_sibivit_swin_t.py.
_base_ = "./retinanet_sibivit_swin_t.py"
binary = dict(recipe="sibivit")
model = dict(
    neck=dict(type="mmbivit.BinaryFPN", binary=binary), bbox_head=dict(type="mmbivit.BinaryRetinaHead", binary=binary)
)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={"shortcut_scale": dict(decay_mult=0.0)}))
