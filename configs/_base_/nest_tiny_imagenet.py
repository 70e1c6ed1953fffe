# What NesT on Tiny-ImageNet shares with Swin: all but the network. Positions do not decay.
_base_ = "../classification/sibivit_swin_t_tiny_imagenet.py"

custom_keys = dict(_delete_=True, pos_embed=dict(decay_mult=0.0))
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=custom_keys))
del custom_keys
