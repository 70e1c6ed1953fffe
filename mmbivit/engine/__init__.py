"""Hooks of the training loop, registered in scope ``mmbivit``."""

from .decoupled_training_hook import DecoupledTrainingHook

__all__ = ["DecoupledTrainingHook"]
