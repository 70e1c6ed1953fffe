# BiT's losses: the squared error of hidden states summed over layers, and soft cross-entropy with the teacher. Its step
# with activations of 2 bits is not here. Its schedule is of language; this one is SI-BiViT's with a single cosine.
_base_ = "./bibert.py"
method = dict(
    model=dict(backbone=dict(recipe="bit")),
    hook=dict(
        distill_loss=[
            dict(type="mmbivit.BlockMSELoss", reduction="sum"),
            dict(type="mmbivit.SoftCrossEntropyLoss"),
        ]
    ),
)
