# The two stages without spatial interaction; the MLP keeps the quarter that would pay for the branch.
_base_ = "../mask_rcnn_sibivit.py"
model = dict(backbone=dict(spatial_interaction=None, mlp_ratio=4))
