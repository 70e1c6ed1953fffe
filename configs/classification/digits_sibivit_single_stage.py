# Binary with spatial interaction from the start, which a narrower MLP pays for.
_base_ = "./digits_binary_no_si.py"
model = dict(backbone=dict(mlp_ratio=3, spatial_interaction=dict(ratio=1.0)))
