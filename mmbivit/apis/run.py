"""Building MMEngine's runner."""

from itertools import count

from mmengine.config import Config
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from mmengine.visualization import Visualizer

__all__ = ["build_runner"]


def build_runner(cfg: Config) -> Runner:
    """Build the runner of a config, also the second one in a process.

    MMEngine keeps visualizers by name for the life of the process: under the name that all of mmdet's configs use, a
    second run would write its log and pictures into the folder of the first.
    """
    visualizer = cfg.get("visualizer") or {}
    if (name := visualizer.get("name")) and Visualizer.check_instance_created(name):
        free = (f"{name}_{i}" for i in count(2))
        visualizer["name"] = next(name for name in free if not Visualizer.check_instance_created(name))
    return RUNNERS.build(cfg) if "runner_type" in cfg else Runner.from_cfg(cfg)
