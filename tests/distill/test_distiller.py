"""The distiller by itself, against Eq. 9 by hand."""

import pytest
import torch

from mmbivit.distill import BlockDistiller, BlockMSELoss
from mmbivit.models import BinarySwinTransformer
from tests.engine.toy import ARCH, ToyModel


def test_distillation_loss_is_equation_9_and_enters_the_gradient():
    """Decision 4, by hand: mean over blocks of the mean squared difference, times the weight."""
    model = ToyModel().train()
    model.backbone.set_stage(1)
    teacher = BinarySwinTransformer(arch=ARCH, recipe="float", out_indices=(1,))
    images, targets = torch.randn(2, 3, 32, 32), torch.zeros(2)
    outputs = {}
    teacher.eval()
    for name, backbone in (("student", model.backbone), ("teacher", teacher)):
        outputs[name] = []
        handles = [
            block.register_forward_hook(lambda m, a, out, name=name: outputs[name].append(out))
            for stage in backbone.stages
            for block in stage.blocks
        ]
        backbone(images)
        for handle in handles:
            handle.remove()
    terms = [(s - t).square().mean() for s, t in zip(outputs["student"], outputs["teacher"], strict=True)]
    expected = 0.5 * sum(terms) / 3
    normalized = sum(t / o.var() for t, o in zip(terms, outputs["teacher"], strict=True)) / 3

    for loss, value in ((BlockMSELoss(), expected), (BlockMSELoss(normalize=True), 0.5 * normalized)):
        distiller = BlockDistiller(model, model.backbone, teacher, loss, weight=0.5)
        losses = model(images, targets, mode="loss")
        torch.testing.assert_close(losses["loss_distill"], value)
        model.zero_grad()
        losses["loss_distill"].backward()
        assert model.backbone.patch_embed.proj.weight.grad.abs().sum() > 0
        assert set(model(images, mode="tensor").shape) == {2}
        distiller.remove()
        assert "loss_distill" not in model(images, targets, mode="loss")
        assert not any(module._forward_hooks for module in [*model.modules(), *teacher.modules()])


def test_a_feature_without_gradient_is_refused(monkeypatch):
    """Decision 5: what reentrant checkpointing would do."""
    model = ToyModel().train()
    model.backbone.set_stage(1)
    teacher = BinarySwinTransformer(arch=ARCH, recipe="float", out_indices=(1,))
    block = model.backbone.stages[0].blocks[1]
    forward = block._forward
    monkeypatch.setattr(block, "_forward", lambda *args: forward(*args).detach())
    BlockDistiller(model, model.backbone, teacher, BlockMSELoss(), weight=1.0)
    with pytest.raises(RuntimeError, match=r"output of stages\.0\.blocks\.1 has no gradient"):
        model(torch.randn(1, 3, 32, 32), torch.zeros(1), mode="loss")
