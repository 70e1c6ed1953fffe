_base_ = "./reactnet_swin_t_tiny_imagenet.py"

model = dict(backbone=dict(spatial_interaction=None, mlp_ratio=4))
