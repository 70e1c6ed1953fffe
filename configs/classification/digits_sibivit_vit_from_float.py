# The ViT of digits_vit_float.py, binary with spatial interaction over all tokens from the start, from float weights.
_base_ = "./digits_vit_float.py"

float_checkpoint = "{{$MMBIVIT_FLOAT_CHECKPOINT:work_dirs/digits_vit_float/epoch_28.pth}}"
load_from = float_checkpoint
model = dict(backbone=dict(recipe="sibivit", mlp_ratio=3, spatial_interaction=dict(ratio=1.0)))
