"""What the tests of several processes add to a config by ``custom_imports``: float64 models, notes, and failures."""

import os
import signal
import time
from pathlib import Path

import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS, MODELS

from mmbivit.models import BinarySwinTransformer, ClassificationPreprocessor, ImageClassifier

# In float64, since a rounding error of float32 can turn a sign and with it a whole network's output.


@MODELS.register_module()
class DoubleClassifier(ImageClassifier):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.double()


@MODELS.register_module()
class DoubleSwin(BinarySwinTransformer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.double()


@MODELS.register_module()
class DoublePreprocessor(ClassificationPreprocessor):
    def forward(self, data, training=False):
        data = super().forward(data, training)
        return data | dict(inputs=data["inputs"].double())


@HOOKS.register_module()
class RankProbe(Hook):
    """Writes what this process has to ``rank<rank>.pth``: losses by iteration, the model before the switch and after.

    The environment variable ``RANK_FAILURE=rank:place:kind`` lets a process fail: in place ``iter<number>``, ``val`` or
    ``save``; of kind ``kill`` (SIGKILL), ``raise`` or ``hang``.
    """

    priority = "VERY_HIGH"  # before the switch

    def __init__(self, switch):
        self.switch, self.notes = switch, dict(losses=[], before=None)

    def before_train(self, runner):
        save = runner.save_checkpoint

        def save_checkpoint(*args, **kwargs):
            fail("save")
            save(*args, **kwargs)

        runner.save_checkpoint = save_checkpoint

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        fail(f"iter{runner.iter}")
        if runner.iter == self.switch:
            self.notes["before"] = state(runner)

    def before_val_iter(self, runner, batch_idx, data_batch=None):
        fail("val")

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.notes["losses"].append({name: value.item() for name, value in outputs.items()})

    def after_train(self, runner):
        after, averages = state(runner), [hook.ema_model for hook in runner.hooks if hasattr(hook, "ema_model")]
        ema = [average.state_dict() for average in averages]
        torch.save(self.notes | dict(after=after, ema=ema), Path(runner.work_dir) / f"rank{get_rank()}.pth")


def state(runner):
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    return {name: value.clone() for name, value in model.state_dict().items()}


def fail(place):
    rank, where, kind = os.environ.get("RANK_FAILURE", "::").split(":")
    if (rank, where) != (str(get_rank()), place):
        return
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "hang":
        time.sleep(600)
    raise RuntimeError(f"made to fail in {place}")
