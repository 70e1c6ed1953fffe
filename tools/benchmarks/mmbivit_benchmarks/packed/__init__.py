"""How fast and how small packed inference is, next to the runtimes that people use for float networks."""

from .detector_run import make_detector_report, run_detector_benchmark
from .networks import NETWORKS
from .report import make_report
from .run import DETECTION, run_benchmark
from .runtimes import RUNTIMES

__all__ = [
    "DETECTION",
    "NETWORKS",
    "RUNTIMES",
    "make_detector_report",
    "make_report",
    "run_benchmark",
    "run_detector_benchmark",
]
