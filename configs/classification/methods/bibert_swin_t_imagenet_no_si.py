_base_ = "./bibert_swin_t_imagenet.py"

model = dict(backbone=dict(spatial_interaction=None, mlp_ratio=4))
