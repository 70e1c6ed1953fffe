"""Hooks of the training loop, the runner and its processes, and what MMEngine lacks on CPUs; scope ``mmbivit``."""

from .atomic_checkpoint_hook import AtomicCheckpointHook
from .cpu import CpuAmpOptimWrapper, CpuDistributedDataParallel, PeakMemoryHook
from .cpu_sync_batch_norm import CpuSyncBatchNorm, use_cpu_sync_batch_norm
from .decoupled_training_hook import DecoupledTrainingHook
from .latest_checkpoint import find_resumable_checkpoint
from .non_finite_hook import NonFiniteHook
from .ranks_hook import RanksHook
from .release_memory_hook import ReleaseMemoryHook
from .resumable_training_hook import ResumableTrainingHook
from .sign_flips_hook import SignFlipsHook
from .termination_hook import TerminationHook
from .throughput_hook import ThroughputHook
from .worker_end_hook import WorkerEndHook

__all__ = [
    "CpuAmpOptimWrapper",
    "CpuDistributedDataParallel",
    "CpuSyncBatchNorm",
    "PeakMemoryHook",
    "use_cpu_sync_batch_norm",
    "AtomicCheckpointHook",
    "DecoupledTrainingHook",
    "NonFiniteHook",
    "RanksHook",
    "ReleaseMemoryHook",
    "ResumableTrainingHook",
    "SignFlipsHook",
    "TerminationHook",
    "ThroughputHook",
    "WorkerEndHook",
    "find_resumable_checkpoint",
]
