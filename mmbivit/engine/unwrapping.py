"""The model inside the wrapper of distributed training."""

from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import Runner
from torch import nn

__all__ = ["optim_wrappers", "unwrapped_model"]


def unwrapped_model(runner: Runner) -> nn.Module:
    """Return a runner's model, without DDP around it."""
    return runner.model.module if is_model_wrapper(runner.model) else runner.model


def optim_wrappers(runner: Runner) -> dict[str | None, OptimWrapper]:
    """Return the wrapper of a runner's optimizer, or those of several by name."""
    wrapper = runner.optim_wrapper
    return dict(wrapper.optim_wrappers) if isinstance(wrapper, OptimWrapperDict) else {None: wrapper}
