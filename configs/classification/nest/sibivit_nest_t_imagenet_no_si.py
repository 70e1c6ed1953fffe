# The baseline without spatial interaction; the MLP keeps the hidden units that would pay for the branch.
_base_ = "./sibivit_nest_t_imagenet.py"

model = dict(backbone=dict(spatial_interaction=None, mlp_ratio=4))
