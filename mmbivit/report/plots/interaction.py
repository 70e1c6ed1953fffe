"""Spatial interaction capability of the network of a config."""

import copy
from pathlib import Path
from typing import TYPE_CHECKING

from mmengine.registry import MODELS, DefaultScope
from rich.table import Table

from mmbivit.analysis.figures.interaction import interaction_figure
from mmbivit.analysis.spatial_interaction import SpatialInteractionCapability, spatial_interaction
from mmbivit.apis.config import load_config
from mmbivit.checks import UserError
from mmbivit.report.complexity import default_shape

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["interaction_table", "measure_interaction", "plot_interaction"]


def measure_interaction(config: str | Path, shape: tuple[int, int] | None = None) -> SpatialInteractionCapability:
    """Compute the spatial interaction capability (SI-BiViT, Eq. 6) of a config's backbone, as it is in stage 2.

    Args:
        config: the config file of a detector or classifier.
        shape: height and width of the image in pixels; by default that of the config's test images.

    Raises:
        FileNotFoundError: if the config does not exist.
        ValueError: if its network has no spatial interaction capability, such as a float one, or for a wrong shape.
    """
    cfg = load_config(config)
    if not cfg.model.get("backbone"):
        raise UserError(f"the model of {config} has no backbone, whose spatial interaction is counted")
    with DefaultScope.overwrite_default_scope(cfg.get("default_scope") or "mmengine"):
        backbone = MODELS.build(copy.deepcopy(cfg.model.backbone))
    return spatial_interaction(backbone, (3, *(shape or default_shape(cfg))))


def plot_interaction(config: str | Path, shape: tuple[int, int] | None = None) -> "Figure":
    """Draw what :func:`measure_interaction` returns; takes the same arguments."""
    return interaction_figure(measure_interaction(config, shape))


def interaction_table(capability: SpatialInteractionCapability) -> Table:
    """Make the table of the spatial interaction capability of each module."""
    _, height, width = capability.input_shape
    table = Table(
        title=f"Spatial interaction capability at {width} x {height} pixels",
        caption="attention 2n(n-1), MLP 0, token mixing 2n'(n-1) a window and layer (SI-BiViT, Eq. 6)",
    )
    for column in ("block", "module"):
        table.add_column(column)
    for column in ("n", "n'", "windows", "SIC"):
        table.add_column(column, justify="right")
    for row in capability.rows:
        hidden = "" if row.hidden_tokens is None else str(row.hidden_tokens)
        table.add_row(row.block, row.module, str(row.tokens), hidden, f"{row.windows:,}", f"{row.sic:,}")
    table.add_section()
    table.add_row("attention alone", "", "", "", "", f"{capability.attention:,}")
    table.add_row("all", "", "", "", f"{capability.times:.3g} times", f"{capability.total:,}")
    return table
