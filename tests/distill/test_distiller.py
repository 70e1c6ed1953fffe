"""The distiller by itself, against Eq. 9 by hand."""

import numpy as np
import pytest
import torch

from mmbivit.distill import BlockMSELoss, Distiller, DistillTerm, SoftCrossEntropyLoss
from mmbivit.models import BinarySwinTransformer, ImageClassifier
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

    for loss, value in (
        (BlockMSELoss(), expected),
        (BlockMSELoss(normalize=True), 0.5 * normalized),
        (BlockMSELoss(reduction="sum"), 3 * expected),
    ):
        distiller = Distiller(model, model.backbone, teacher, [DistillTerm(loss, 0.5)])
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
    Distiller(model, model.backbone, teacher, [DistillTerm(BlockMSELoss())])
    with pytest.raises(RuntimeError, match=r"output of stages\.0\.blocks\.1 has no gradient"):
        model(torch.randn(1, 3, 32, 32), torch.zeros(1), mode="loss")


def classifier(num_classes=5, **backbone):
    torch.manual_seed(len(backbone))
    options = dict(type="mmbivit.BinarySwinTransformer", arch=ARCH, out_indices=(1,), drop_path_rate=0.0)
    return ImageClassifier(options | backbone, num_classes=num_classes)


def test_logits_are_distilled_beside_blocks_and_the_task_is_weighed():
    """Soft cross-entropy by hand; blocks of a teacher that is a whole classifier."""
    model, teacher = classifier().train(), classifier(recipe="float").eval()
    images, labels = torch.randn(3, 3, 32, 32), torch.tensor([0, 4, 2])
    task = model(images, labels, mode="loss")["loss_cls"]
    p, log_q = teacher(images).detach().numpy(), model(images).detach().numpy()
    p = np.exp(p) / np.exp(p).sum(1, keepdims=True)
    log_q = log_q - np.log(np.exp(log_q).sum(1, keepdims=True))
    terms = [DistillTerm(SoftCrossEntropyLoss(), 0.95), DistillTerm(BlockMSELoss())]
    distiller = Distiller(model, model.backbone, teacher, terms, task_weight=0.05)
    losses = model(images, labels, mode="loss")
    assert set(losses) == {"loss_cls", "loss_distill", "loss_distill_logits"}
    torch.testing.assert_close(losses["loss_cls"], 0.05 * task)
    assert losses["loss_distill_logits"].item() == pytest.approx(0.95 * -(p * log_q).sum(1).mean(), rel=1e-5)
    losses["loss_distill_logits"].backward()
    assert model.head.weight.grad.abs().sum() > 0 and teacher.head.weight.grad is None
    distiller.remove()
    assert set(model(images, labels, mode="loss")) == {"loss_cls"}


def test_lists_of_losses_are_weighed_each():
    class Levels(ToyModel):
        def forward(self, inputs, targets=None, mode="tensor"):
            loss = super().forward(inputs, targets, mode)["loss_task"]
            return dict(loss_levels=[loss, 2 * loss], acc=torch.ones(()))

    model = Levels().train()
    images, targets = torch.randn(2, 3, 32, 32), torch.zeros(2)
    before = model(images, targets, mode="loss")["loss_levels"]
    teacher = BinarySwinTransformer(arch=ARCH, recipe="float", out_indices=(1,))
    Distiller(model, model.backbone, teacher, [DistillTerm(BlockMSELoss())], task_weight=0.5)
    losses = model(images, targets, mode="loss")
    torch.testing.assert_close(losses["loss_levels"], [loss / 2 for loss in before])
    assert losses["acc"] == 1


@pytest.mark.parametrize(
    ("model", "teacher", "message"),
    [
        (ToyModel(), classifier(), "the model is a ToyModel, which has no logits"),
        (classifier(), classifier().backbone, "the teacher is a BinarySwinTransformer, which has no logits"),
        (classifier(), classifier(num_classes=7), "the teacher has 7 classes and the student 5"),
    ],
)
def test_logits_need_two_classifiers_of_the_same_classes(model, teacher, message):
    with pytest.raises(ValueError, match=message):
        Distiller(model, model.backbone, teacher, [DistillTerm(SoftCrossEntropyLoss())])
