# Binary from the start, without spatial interaction.
_base_ = "./digits_swin_float.py"
model = dict(backbone=dict(recipe="sibivit"))
