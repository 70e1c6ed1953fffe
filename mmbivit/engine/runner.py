"""Building MMEngine's runner."""

from collections.abc import Iterable, Sized
from functools import wraps
from itertools import count
from typing import Any

from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from mmengine.visualization import Visualizer
from torch.utils.data import DataLoader

from mmbivit.checks import UserError
from mmbivit.datasets.checked_pipeline import check_pipelines

from .quiet import quiet_logger

__all__ = ["build_runner"]


def build_runner(cfg: Config, notes: Iterable[str] = ()) -> Runner:
    """Build the runner of a config, also the second one in a process.

    MMEngine keeps visualizers by name for the life of the process: under the name that all of mmdet's configs use, a
    second run would write its log and pictures into the folder of the first. Images that cannot be used are named, see
    :func:`mmbivit.datasets.checked_pipeline.check_pipelines`.

    Args:
        cfg: the config.
        notes: what to write into the log of the run first.
    """
    visualizer = cfg.get("visualizer") or {}
    if (name := visualizer.get("name")) and Visualizer.check_instance_created(name):
        free = (f"{name}_{i}" for i in count(2))
        visualizer["name"] = next(name for name in free if not Visualizer.check_instance_created(name))
    runner = RUNNERS.build(cfg) if "runner_type" in cfg else Runner.from_cfg(cfg)
    quiet_logger(runner.logger)
    for note in notes:
        print_log(note, "current")
    _check_pipelines(runner)
    return runner


def _check_pipelines(runner: Runner) -> None:
    """Let the runner check the images of each data loader that it builds; workers start later."""
    build_dataloader = runner.build_dataloader

    @wraps(build_dataloader)
    def build_checked(*args: Any, **kwargs: Any) -> DataLoader:
        loader = build_dataloader(*args, **kwargs)
        if isinstance(loader.dataset, Sized) and len(loader) == 0:
            raise UserError(
                f"a data loader has no batch: {len(loader.dataset)} images, batch_size={loader.batch_size}, "
                f"drop_last={loader.drop_last}; it needs more images, or a smaller batch_size"
            )
        check_pipelines(loader.dataset)
        return loader

    runner.build_dataloader = build_checked
