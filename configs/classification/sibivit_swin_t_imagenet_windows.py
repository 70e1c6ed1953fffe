# Not the paper's: tokens are mixed within windows, and patch merging is binary, as in our detectors that start from
# float weights. Cheap at any resolution.
_base_ = "./sibivit_swin_t_imagenet.py"

model = dict(backbone=dict(spatial_interaction=dict(axis="window"), downsample="binary"))
