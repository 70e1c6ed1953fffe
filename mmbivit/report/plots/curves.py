"""Training curves of a work dir."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mmbivit.analysis.figures.curves import curves_figure
from mmbivit.analysis.training_log import read_training_log

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_curves"]


def plot_curves(work_dir: str | Path, keys: Sequence[str] | None = None) -> "Figure":
    """Draw what training logged over the iterations of both stages, the switch marked.

    Args:
        work_dir: the ``--work-dir`` of training.
        keys: entries of the log, a panel each; by default losses, learning rate and the main metrics.

    Returns:
        The figure, see :func:`mmbivit.analysis.figures.curves.curves_figure`.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if it has no log, the log is damaged, or a key is not in it.
    """
    return curves_figure(read_training_log(work_dir), keys)
