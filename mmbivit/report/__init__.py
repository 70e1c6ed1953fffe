"""One page on a training run: ``tools/analysis_tools/report.py``."""

from .report import write_report

__all__ = ["write_report"]
