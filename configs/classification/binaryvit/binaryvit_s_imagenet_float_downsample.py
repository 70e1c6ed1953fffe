# BinaryViT with float convolutions between its stages, the variant with a star in its Table 4.
_base_ = "./binaryvit_s_imagenet.py"

model = dict(backbone=dict(downsample="float"))
