# BiViT's cross-layer order: attention's weights are binary first, the MLP's later. How long its stages are is not
# published: half of the epochs each is ours, as is SI-BiViT's optimizer with a single cosine. No distillation.
_base_ = "./bibert.py"
attention_first = dict(activations=True, weights=["attn"], branch=True)
method = dict(
    model=dict(backbone=dict(recipe="bivit", training_stages=[attention_first])),
    hook=dict(switch_epoch=[150], distill_loss=None, task_weight=1.0, teacher=None, reset_lr=False),
)
del attention_first
