"""The network of a config as it is built."""

import copy
from pathlib import Path
from typing import TYPE_CHECKING

from mmengine.registry import MODELS, DefaultScope

from mmbivit.analysis.figures.network import network_figure
from mmbivit.apis.config import load_config
from mmbivit.checks import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_network"]


def plot_network(config: str | Path) -> "Figure":
    """Draw the backbone of a config, as it is in its last training stage.

    Args:
        config: the config file of a detector or classifier.

    Raises:
        FileNotFoundError: if the config does not exist.
        ValueError: if its model has no backbone, or one without blocks that are known.
    """
    cfg = load_config(config)
    if not cfg.model.get("backbone"):
        raise UserError(f"the model of {config} has no backbone, which is drawn")
    with DefaultScope.overwrite_default_scope(cfg.get("default_scope") or "mmengine"):
        backbone = MODELS.build(copy.deepcopy(cfg.model.backbone))
    return network_figure(backbone, f"{type(backbone).__name__} of {Path(config).stem}")
