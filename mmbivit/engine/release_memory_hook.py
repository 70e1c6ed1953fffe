"""Gives memory back that validation has used."""

from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmbivit.registry import HOOKS

from .allocator import release_freed_memory

__all__ = ["ReleaseMemoryHook"]


@HOOKS.register_module()
class ReleaseMemoryHook(Hook):
    """Returns free memory to the system after each validation.

    glibc keeps what is freed between blocks that are in use. On CPUs, training and validation of a detector in turn
    split it ever more finely, and the process grows with each validation, although nothing leaks. Other systems'
    allocators are left alone.
    """

    priority = "LOWEST"

    def after_val_epoch(self, runner: Runner, metrics: Any = None) -> None:
        """Let glibc look for free pages."""
        release_freed_memory()
