"""Picture of the balancing factors."""

from pathlib import Path
from typing import TYPE_CHECKING

from mmbivit.analysis.balancing import balancing_factors
from mmbivit.analysis.figures.balancing import balancing_figure
from mmbivit.engine.decoupled_training_hook import find_staged_backbone
from mmbivit.report.inputs import load_stage2_model

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_balancing"]


def plot_balancing(config: str | Path, checkpoint: str | Path) -> "Figure":
    """Draw the balancing factors of each block of a trained network (SI-BiViT, Figure 5).

    Args:
        config: the config file of a detector or classifier.
        checkpoint: file or URL of its weights, of training stage 2.

    Raises:
        FileNotFoundError: if a file does not exist.
        ValueError: if they do not fit, or the network has no spatial interaction.
    """
    _, model = load_stage2_model(config, checkpoint)
    return balancing_figure(balancing_factors(find_staged_backbone(model)))
