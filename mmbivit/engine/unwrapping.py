"""The model inside the wrapper of distributed training."""

from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import nn

__all__ = ["unwrapped_model"]


def unwrapped_model(runner: Runner) -> nn.Module:
    """Return a runner's model, without DDP around it."""
    return runner.model.module if is_model_wrapper(runner.model) else runner.model
