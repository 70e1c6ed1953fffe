# The two stages without spatial interaction, at the same MLP ratio as with it.
_base_ = "../mask_rcnn_sibivit.py"
model = dict(backbone=dict(spatial_interaction=None))
