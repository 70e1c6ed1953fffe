"""A loss that is no number reaches neither weights nor checkpoints."""

from types import SimpleNamespace

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from mmengine.structures import BaseDataElement
from torch import nn

from mmbivit.checkpoints import load_checkpoint_file
from mmbivit.engine import NonFiniteHook
from mmbivit.engine.non_finite_hook import _image_names

from .toy import ToyModel, make_runner

HOOK = dict(type="mmbivit.NonFiniteHook")


class Model(BaseModel):
    """Has a BatchNorm, and losses that are bad in chosen calls of the forward."""

    def __init__(self, bad=(), value=float("nan"), in_list=False):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.head = nn.BatchNorm2d(3), nn.Linear(3, 1)
        self.bad, self.value, self.in_list, self.calls = bad, value, in_list, 0

    def forward(self, inputs, data_samples=None, mode="tensor"):
        is_bad = self.calls in self.bad
        self.calls += 1
        out = self.head(self.norm(inputs * (self.value if is_bad else 1)).mean((2, 3)))[:, 0]
        loss = (out - data_samples).square().mean()
        return dict(loss_a=[loss, loss], acc=torch.tensor(float("nan"))) if self.in_list else dict(loss_a=loss)


class States(Hook):
    """Weights, running statistics and losses after each iteration."""

    priority = "VERY_LOW"

    def __init__(self):
        self.rows = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.rows.append([value.clone() for value in runner.model.state_dict().values()])


def train(work_dir, model, hook=HOOK, length=2, **kwargs):
    states = States()
    runner = make_runner(work_dir, None, model=model, length=length, hooks=[hook, states], **kwargs)
    runner.train()
    return runner, states.rows


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("in_list", [False, True])
def test_the_first_one_stops_the_run_before_it_is_saved(tmp_path, value, in_list):
    message = r"loss not finite in iteration 6: loss_a of images unknown \(rank 0\)\. No weight was changed"
    with pytest.raises(FloatingPointError, match=message):
        train(tmp_path, Model(bad=[5], value=value, in_list=in_list))
    checkpoint = load_checkpoint_file(str(tmp_path / "epoch_1.pth"))
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())
    assert not (tmp_path / "epoch_2.pth").exists()


@pytest.mark.parametrize("accumulate", [1, 3])
def test_skipped_steps_change_nothing(tmp_path, accumulate):
    """Weights and buffers are as after the step before, or at the start."""
    hook = HOOK | dict(max_skipped=2)
    model = Model(bad=[2, 5])
    start = [value.clone() for value in model.state_dict().values()]
    runner, states = train(tmp_path, model, hook, optim=dict(accumulative_counts=accumulate))
    for bad in (2, 5):
        before = states[bad - 1] if accumulate == 1 else start
        assert all(torch.equal(a, b) for a, b in zip(before, states[bad], strict=True))
    moved = [not torch.equal(states[i - 1][-2], states[i][-2]) for i in range(1, 8)]
    # Accumulating three, steps are due after iterations 2, 5 (both have a bad one) and at the end.
    assert moved == ([i not in (2, 5) for i in range(1, 8)] if accumulate == 1 else [i == 7 for i in range(1, 8)])
    assert all(value.isfinite().all() for value in states[-1])
    assert runner.message_hub.get_info("skipped_steps") == 2
    saved = load_checkpoint_file(str(tmp_path / "epoch_2.pth"))["message_hub"]["runtime_info"]
    assert saved["skipped_steps"] == 2


class NanInput(ToyModel):
    """A binary network whose second batch is no number: patch merging has no shortcut, so its loss is finite."""

    calls = 0

    def forward(self, inputs, data_samples=None, mode="tensor"):
        self.calls += 1
        losses = super().forward(inputs * (float("nan") if self.calls == 2 else 1), data_samples, mode)
        assert losses["loss_task"].isfinite()
        return losses


def test_what_signs_hide_is_found_in_the_gradients(tmp_path):
    message = (
        r"gradient not finite in iteration 2: backbone.patch_embed.* and \d+ others, of images unknown \(rank 0\)\."
    )
    with pytest.raises(FloatingPointError, match=message):
        train(tmp_path, NanInput(), length=1)
    runner, states = train(tmp_path / "skip", NanInput(), HOOK | dict(max_skipped=1), length=1)
    assert all(torch.equal(a, b) for a, b in zip(states[0], states[1], strict=True))
    assert all(value.isfinite().all() for value in runner.model.state_dict().values())


def test_overflow_in_float16_is_left_to_the_scaler(tmp_path):
    class Scaled(OptimWrapper):
        """Has a scaler, as AmpOptimWrapper, which needs a GPU; it is enabled, but takes no part here."""

        loss_scaler = SimpleNamespace(is_enabled=lambda: True)

        def step(self, **kwargs):
            taken.append(1)

        def state_dict(self):
            return {}

    class Root(Model):
        """The gradient of a square root is infinite at 0."""

        def forward(self, inputs, data_samples=None, mode="tensor"):
            return dict(loss_a=(self.head.weight * 0).sum().sqrt())

    taken = []
    train(tmp_path / "scaled", Root(), length=1, optim=dict(type=Scaled))
    assert len(taken) == 4
    with pytest.raises(FloatingPointError, match=r"gradient not finite in iteration 1: head\.weight, of images"):
        train(tmp_path / "plain", Root(), length=1)


def test_more_than_allowed_stop_the_run_also_after_a_resume(tmp_path):
    hook = HOOK | dict(max_skipped=2)
    train(tmp_path, Model(bad=[0, 3]), hook, length=1)
    with pytest.raises(FloatingPointError, match="loss not finite in iteration 6"):
        resume = dict(resume=True, load_from=str(tmp_path / "epoch_1.pth"))
        train(tmp_path / "more", Model(bad=[1]), hook, length=2, **resume)


def test_finite_losses_of_infinite_sum_count(tmp_path):
    class Large(Model):
        def forward(self, inputs, data_samples=None, mode="tensor"):
            loss = self.head(inputs.mean((2, 3))).mean() * 0 + 3e38
            return dict(loss_a=loss, loss_b=loss)

    with pytest.raises(FloatingPointError, match="loss not finite in iteration 1: loss_a, loss_b of"):
        train(tmp_path, Large())


@pytest.mark.parametrize("name", ["head.weight", "norm.running_var"])
def test_what_is_not_finite_is_never_saved(tmp_path, name):
    """As from a gradient that overflows while the loss does not."""

    class Break(Hook):
        def after_train_epoch(self, runner):
            runner.model.state_dict()[name].fill_(float("inf"))

    with pytest.raises(
        FloatingPointError, match=f"{name} is not finite after iteration 5, although losses and gradients were"
    ):
        make_runner(tmp_path, None, model=Model(), length=1, hooks=[HOOK, Break()]).train()
    assert not list(tmp_path.glob("*.pth"))


def test_good_runs_are_as_without_the_hook(tmp_path):
    plain, watched, skipping = (
        train(tmp_path / str(i), Model(), hook)[1][-1]
        for i, hook in enumerate([dict(type="ThroughputHook", _scope_="mmbivit"), HOOK, HOOK | dict(max_skipped=1)])
    )
    for values in zip(plain, watched, skipping, strict=True):
        assert torch.equal(values[0], values[1]) and torch.equal(values[0], values[2])


def test_nothing_is_left_on_the_model(tmp_path):
    runner, _ = train(tmp_path, Model(), HOOK | dict(max_skipped=1), length=1)
    assert not runner.model._forward_hooks
    assert runner.optim_wrapper.step.__func__ is OptimWrapper.step


def test_images_are_named_by_id_else_by_path():
    samples = [BaseDataElement(metainfo=dict(img_id=7, img_path="a.jpg")), BaseDataElement(metainfo=dict(img_path="b"))]
    assert _image_names(dict(data_samples=samples)) == ["7", "b"]
    assert _image_names(dict(inputs=None, img_path=["c", "d"])) == ["c", "d"]
    assert _image_names(dict(data_samples=torch.zeros(2))) == _image_names([]) == ["unknown"]


def test_a_negative_number_is_refused():
    with pytest.raises(ValueError, match="max_skipped=-1; allowed: an integer of 0 or more"):
        NonFiniteHook(max_skipped=-1)
