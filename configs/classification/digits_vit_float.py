# A float ViT of 65 tokens, even smaller than the Swin of digits_swin_float.py.
_base_ = "./digits_swin_float.py"

network = dict(type="mmbivit.BinaryVisionTransformer", arch=dict(embed_dims=32, depths=(3,), num_heads=(2,)))
network.update(patch_size=4, pretrain_img_size=32, out_type="cls_token", drop_path_rate=0.0)
model = dict(backbone=dict(_delete_=True, recipe="float", mlp_ratio=4, **network))
