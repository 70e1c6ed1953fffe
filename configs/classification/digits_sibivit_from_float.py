# The control of the two stages: from the same float weights, but binary with spatial interaction from the start.
_base_ = "./digits_sibivit_single_stage.py"

float_checkpoint = "{{$MMBIVIT_FLOAT_CHECKPOINT:work_dirs/digits_swin_float/epoch_28.pth}}"
load_from = float_checkpoint
