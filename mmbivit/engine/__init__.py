"""Hooks of the training loop, registered in scope ``mmbivit``."""

from .decoupled_training_hook import DecoupledTrainingHook
from .throughput_hook import ThroughputHook

__all__ = ["DecoupledTrainingHook", "ThroughputHook"]
