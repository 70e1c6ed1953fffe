# A plain binary Swin: single stage, no spatial interaction.
_base_ = "./single_stage_si.py"
model = dict(backbone=dict(spatial_interaction=None, mlp_ratio=4))
