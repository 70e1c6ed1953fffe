# The ablation without spatial interaction; the MLP keeps the hidden units that would pay for the branch.
_base_ = "./cascade_mask_rcnn_sibivit_swin_t.py"

model = dict(backbone=dict(spatial_interaction=None, mlp_ratio=4))
