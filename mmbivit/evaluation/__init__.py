"""Metrics, registered in scope ``mmbivit``."""

from .top_k_accuracy import TopKAccuracy

__all__ = ["TopKAccuracy"]
