"""The demo of ``make demo``: the steps that train and pack, and the comparison that is shown at the end."""

from .comparison import draw_comparison, predict_scenes, report_table
from .speed import measure_speed
from .steps import FULL, QUICK, DemoPlan, demo_steps, run_steps

__all__ = [
    "FULL",
    "QUICK",
    "DemoPlan",
    "demo_steps",
    "draw_comparison",
    "measure_speed",
    "predict_scenes",
    "report_table",
    "run_steps",
]
