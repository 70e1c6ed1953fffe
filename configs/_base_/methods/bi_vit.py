# Bi-ViT: as its baseline (bireal.py), and ten times the ranking loss of attention maps (Eq. 14).
_base_ = "./bireal.py"
method = dict(
    model=dict(backbone=dict(recipe="bi-vit")),
    hook=dict(
        distill_loss=[
            dict(type="mmbivit.HardCrossEntropyLoss", weight=0.5),
            dict(type="mmbivit.AttentionRankingLoss", weight=10.0),
        ]
    ),
)
