_base_ = "./bi_vit_swin_t_imagenet.py"

model = dict(backbone=dict(spatial_interaction=None, mlp_ratio=4))
