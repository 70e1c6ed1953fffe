# What ViT and DeiT on Tiny-ImageNet share with Swin: all but the network. Positions and tokens beside the grid do not
# decay.
_base_ = "../classification/sibivit_swin_t_tiny_imagenet.py"

still = dict(decay_mult=0.0)
custom_keys = dict(_delete_=True, absolute_pos_embed=still, extra_embed=still)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=custom_keys))
del still, custom_keys
