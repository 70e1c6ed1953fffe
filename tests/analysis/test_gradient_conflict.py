import copy

import pytest
import torch
from torch import nn

from mmbivit.analysis.gradient_conflict import ConflictRow, GradientConflict, gradient_conflict, split_gradient
from mmbivit.distill import BlockMSELoss, DistillTerm
from mmbivit.models import BinarySwinTransformer
from tests.engine.toy import ARCH, ToyData, ToyModel

BLOCKS = ("stages.0.blocks.0", "stages.0.blocks.1", "stages.1.blocks.0")


class TwoLosses(ToyModel):
    """Has its task in two losses, and a number that is no loss."""

    def forward(self, inputs, data_samples=None, mode="tensor"):
        out = self.head(self.backbone(inputs)[0].mean((2, 3)))[:, 0]
        if mode != "loss":
            return out
        error = out - data_samples
        return dict(loss_a=[error.square().mean(), error.abs().mean()], loss_b=out.mean(), accuracy=-1000 * out.sum())

    @staticmethod
    def task_loss(losses):
        return losses["loss_a"][0] + losses["loss_a"][1] + losses["loss_b"]


def make_model(cls=ToyModel, **backbone):
    model = cls(**backbone)
    for branch in (block.mlp.si for stage in model.backbone.stages for block in stage.blocks):
        nn.init.normal_(branch.alpha)
    return model


def make_teacher(**kwargs):
    torch.manual_seed(1)
    return BinarySwinTransformer(**dict(arch=ARCH, recipe="float", out_indices=(1,)) | kwargs)


def make_batches():
    data = ToyData()
    return [dict(inputs=data.images[i : i + 4], data_samples=data.targets[i : i + 4]) for i in (0, 4)]


def test_split_by_hand():
    #                        same   other  none  task 0  same  task 0  both 0
    distill = torch.tensor([[2.0], [-3.0], [0.0], [5.0], [-1.0], [-4.0], [0.0]])
    task = torch.tensor([[0.5], [20.0], [3.0], [0.0], [-7.0], [-0.0], [0.0]])
    assert split_gradient(distill, task) == (2 + 1, 3 + 5 + 4)
    assert split_gradient(distill, -task) == (3, 2 + 5 + 1 + 4)
    assert split_gradient(distill, distill) == (15, 0)
    assert split_gradient(torch.zeros(2, 2), torch.ones(2, 2)) == (0, 0)


def test_sums_by_hand():
    rows = (
        ConflictRow("a", "fc1.weight", 1.0, 2.0),
        ConflictRow("a", "fc2.weight", 4.0, 8.0),
        ConflictRow("b", "fc1.weight", 16.0, 0.0),
    )
    conflict = GradientConflict(rows, 1)
    assert (conflict.harmonious, conflict.conflicting, conflict.share) == (21, 10, 10 / 31)
    assert conflict.by_block() == {"a": (5, 10), "b": (16, 0)}


def gradients_by_backward(model, loss_of):
    """Return the gradients of the branches' weights, from a backward pass of its own on a copy of the model."""
    model = copy.deepcopy(model).train()
    loss_of(model).backward()
    parameters = dict(model.backbone.named_parameters())
    return [parameters[f"{block}.mlp.si.{fc}.weight"].grad for block in BLOCKS for fc in ("fc1", "fc2")]


def distance(model, teacher, images):
    """Return three times the mean over blocks of the MSE between outputs, each divided by the target's variance."""
    outputs = {}
    for network in (model.backbone, teacher.eval()):
        seen = outputs[network] = []
        for stage in network.stages:
            for block in stage.blocks:
                block.register_forward_hook(lambda module, args, output, seen=seen: seen.append(output))
        network(images)
    targets = [target.detach() for target in outputs[teacher]]
    errors = [(a - b).pow(2).mean() / b.var() for a, b in zip(outputs[model.backbone], targets, strict=True)]
    return 3 * sum(errors) / len(errors)


def test_equals_two_backward_passes():
    model, teacher, batches = make_model(TwoLosses), make_teacher(), make_batches()
    conflict = gradient_conflict(model, teacher, iter(batches), [DistillTerm(BlockMSELoss(normalize=True), 3.0)])
    expected = torch.zeros(6, 2)
    for batch in batches:
        task = gradients_by_backward(model, lambda m, b=batch: m.task_loss(m(**b, mode="loss")))
        distill = gradients_by_backward(model, lambda m, b=batch: distance(m, copy.deepcopy(teacher), b["inputs"]))
        for i, (d, t) in enumerate(zip(distill, task, strict=True)):
            along = (d * t > 0).float()
            expected[i] += torch.stack([(d.abs() * along).sum(), (d.abs() * (1 - along)).sum()]) / len(batches)
    assert conflict.batches == 2
    assert [(row.block, row.weight) for row in conflict.rows] == [
        (block, f"{fc}.weight") for block in BLOCKS for fc in ("fc1", "fc2")
    ]
    assert expected.min() > 0  # both kinds are there to be compared
    actual = torch.tensor([(row.harmonious, row.conflicting) for row in conflict.rows])
    # Sums of about 2000 float32 gradients in another order.
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=0)


def test_the_default_is_the_plain_distance():
    model, teacher, batches = make_model(), make_teacher(), make_batches()
    once = gradient_conflict(model, teacher, batches)
    assert once == gradient_conflict(model, teacher, batches, [DistillTerm(BlockMSELoss(normalize=False), 1.0)])


def test_agrees_with_itself_if_the_task_is_distillation():
    class Distilled(ToyModel):
        def forward(self, inputs, data_samples=None, mode="tensor"):
            features = []
            hooks = [
                block.register_forward_hook(lambda module, args, output: features.append(output))
                for stage in self.backbone.stages
                for block in stage.blocks
            ]
            self.backbone(inputs)
            [hook.remove() for hook in hooks]
            return dict(loss_task=data_samples * sum(feature.square().mean() for feature in features))

    teacher, images = make_teacher(), ToyData().images
    for block in (block for stage in teacher.stages for block in stage.blocks):
        block.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    model = make_model(Distilled)
    along = gradient_conflict(model, teacher, [dict(inputs=images, data_samples=1.0)])
    against = gradient_conflict(model, teacher, [dict(inputs=images, data_samples=-1.0)])
    # Gradients near 0 may differ in the order of sums.
    assert along.share < 1e-4
    assert against.share > 1 - 1e-4
    assert along.harmonious == pytest.approx(against.conflicting, rel=1e-3)


def test_recomputed_blocks_give_the_same():
    plain, recomputing = make_model(), make_model(with_cp=True)
    recomputing.load_state_dict(plain.state_dict())
    expected = gradient_conflict(plain, make_teacher(), make_batches())
    assert gradient_conflict(recomputing, make_teacher(), make_batches()) == expected
    assert all(block.with_cp for stage in recomputing.backbone.stages for block in stage.blocks)


@pytest.mark.parametrize("failing", [False, True])
def test_the_model_is_left_as_it_was(failing):
    model = make_model().train()
    model.backbone.stages[0].eval()
    model.head.weight.grad = torch.ones_like(model.head.weight)
    before = copy.deepcopy(model)
    batches = make_batches()
    if failing:
        batches[1]["data_samples"] = "no number"
        with pytest.raises(TypeError):
            gradient_conflict(model, make_teacher(), batches)
    else:
        gradient_conflict(model, make_teacher(), batches)
    assert [module.training for module in model.modules()] == [module.training for module in before.modules()]
    for key, value in before.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    for (name, parameter), other in zip(model.named_parameters(), before.parameters(), strict=True):
        assert parameter.requires_grad
        assert (parameter.grad is None) == (name != "head.weight")
        assert other.grad is None or torch.equal(parameter.grad, other.grad)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_frozen_branches_are_left_out():
    model = make_model(frozen_stages=1)
    conflict = gradient_conflict(model, make_teacher(), make_batches())
    assert [(row.block, row.weight) for row in conflict.rows] == [
        ("stages.1.blocks.0", "fc1.weight"),
        ("stages.1.blocks.0", "fc2.weight"),
    ]
    assert conflict.rows[0].harmonious > 0


def stage_1():
    model = make_model()
    model.backbone.set_stage(1)
    return model


def diverged():  # the gradient of distillation alone stays finite
    model = make_model()
    nn.init.constant_(model.head.weight, torch.nan)
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (stage_1, "in training stage 1.*give a checkpoint of stage 2"),
        (lambda: ToyModel(spatial_interaction=None), "no spatial interaction branch"),
        (lambda: make_model(frozen_stages=2), "all spatial interaction branches are frozen"),
        (ToyModel, "all balancing factors alpha are 0.*trained in stage 2"),
        (diverged, "is not finite"),
    ],
)
def test_a_model_without_gradients_is_refused_in_one_line(make, message):
    with pytest.raises(ValueError, match=message) as error:
        gradient_conflict(make(), make_teacher(), make_batches())
    assert "\n" not in str(error.value)


def test_impossible_settings_are_refused_in_one_line():
    model, batches = make_model(), make_batches()
    with pytest.raises(ValueError, match="there is no batch"):
        gradient_conflict(model, make_teacher(), [])
    with pytest.raises(ValueError, match="is 0 in all .* weights: is distill_weight 0"):
        gradient_conflict(model, make_teacher(), batches, [DistillTerm(BlockMSELoss(), 0.0)])
    with pytest.raises(ValueError, match="the teacher's blocks do not match"):
        gradient_conflict(model, make_teacher(arch=dict(ARCH, depths=(1, 1))), batches)
