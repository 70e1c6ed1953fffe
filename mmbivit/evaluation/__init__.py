"""Metrics, registered in scope ``mmbivit``."""

from .per_class import ClassPrecision, precision_per_class
from .top_k_accuracy import TopKAccuracy

__all__ = ["ClassPrecision", "TopKAccuracy", "precision_per_class"]
