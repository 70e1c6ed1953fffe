# SI-BiViT's two stages at the same total of 28 epochs, from the float network of the same task, which is the teacher:
# 14 epochs with distillation (cosine to 30 %), then 14 all binary (rates and optimizer are reset; cosine to 1 %).
_base_ = "./digits_sibivit_from_float.py"

switch_epoch = 14
custom_hooks = [
    dict(
        type="mmbivit.DecoupledTrainingHook",
        switch_epoch=switch_epoch,
        teacher=dict(
            type="mmbivit.BinarySwinTransformer",
            arch={{_base_.arch}},
            recipe="float",
            window_size=4,
            shift_single_window=False,
            out_indices=(1,),
            init_cfg=dict(type="Pretrained", checkpoint={{_base_.float_checkpoint}}),
        ),
        distill_loss=dict(type="mmbivit.BlockMSELoss", normalize=True),
        distill_weight=0.1,
        reset_lr=True,
        reset_optimizer=True,  # docs/experiments.md
    )
]
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, begin=0, end=2, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min_ratio=0.3, begin=2, end=switch_epoch, convert_to_iter_based=True),
    dict(type="LinearLR", start_factor=0.05, begin=switch_epoch, end=switch_epoch + 0.5, convert_to_iter_based=True),
    dict(
        type="CosineAnnealingLR",
        eta_min_ratio=0.01,
        begin=switch_epoch + 0.5,
        end={{_base_.max_epochs}},
        convert_to_iter_based=True,
    ),
]
