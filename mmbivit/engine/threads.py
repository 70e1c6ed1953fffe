"""How many threads each of several processes on one machine computes with."""

import os
import socket
from pathlib import Path

import torch
from mmengine.dist import all_gather_object, get_world_size

__all__ = ["processes_of_this_machine", "share_threads"]

THREADS = "OMP_NUM_THREADS"


def processes_of_this_machine() -> int:
    """Count the processes of a distributed run on this machine: torchrun says so, else those of this host's name."""
    if "LOCAL_WORLD_SIZE" in os.environ:
        return int(os.environ["LOCAL_WORLD_SIZE"])
    return all_gather_object(socket.gethostname()).count(socket.gethostname())


def share_threads() -> int:
    """Let each process of a distributed run compute with its share of this machine's cores, and return how many.

    ``OMP_NUM_THREADS`` counts, where the user has set it. A single process keeps what it has.
    """
    if get_world_size() > 1:
        local = processes_of_this_machine()
        chosen = _threads_of_the_user()
        torch.set_num_threads(chosen or max(1, _cores() // local))
    return torch.get_num_threads()


def _cores() -> int:
    """Count the cores that this process may use, which can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _threads_of_the_user() -> int | None:
    """Return the user's ``OMP_NUM_THREADS``.

    torchrun sets it to 1 for several processes, if it is not set. What it was started with itself tells that from a
    user's 1, and Linux knows that; elsewhere a 1 is taken for torchrun's.
    """
    value = os.environ.get(THREADS, "")
    if not value.isdecimal() or int(value) == 0:
        return None
    if value != "1" or "TORCHELASTIC_RUN_ID" not in os.environ:
        return int(value)
    try:
        started_with = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    return 1 if f"{THREADS}=1".encode() in started_with else None
