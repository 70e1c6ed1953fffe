"""Sign flips of a work dir."""

from pathlib import Path
from typing import TYPE_CHECKING

from mmbivit.analysis.figures.flips import flips_figure
from mmbivit.analysis.training_log import read_training_log

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_flips"]


def plot_flips(work_dir: str | Path) -> "Figure":
    """Draw the share of binary weights that flipped their sign, of all and of each layer, over training.

    Args:
        work_dir: the ``--work-dir`` of training with :class:`mmbivit.SignFlipsHook`.

    Returns:
        The figure, see :func:`mmbivit.analysis.figures.flips.flips_figure`.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if it has no log, or the log is damaged or has no sign flips.
    """
    return flips_figure(read_training_log(work_dir))
