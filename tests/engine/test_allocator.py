"""glibc's allocator keeps memory between iterations, and gives it back after validation."""

import platform
import subprocess
import sys

import psutil
import pytest

from mmbivit.engine import ReleaseMemoryHook
from mmbivit.engine.allocator import keep_freed_memory

glibc_alone = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc alone")

# In a process of its own: what is said to the allocator stays said.
COUNT_FAULTS = """
import resource
import torch
from mmbivit.engine.allocator import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)  # 64 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(min(faults() for _ in range(3)))
keep_freed_memory()
print(min(faults() for _ in range(5)))
"""


@glibc_alone
def test_the_memory_of_a_tensor_is_kept_for_the_next_one():
    done = subprocess.run([sys.executable, "-c", COUNT_FAULTS], capture_output=True, text=True, check=True)
    default, kept = map(int, done.stdout.split())
    assert default > 10  # pages of 4 KB, or huge ones
    assert kept < default / 10


@glibc_alone
def test_memory_between_blocks_in_use_is_returned_after_validation():
    blocks = [bytes(2000) for _ in range(100_000)]  # 200 MB, in pieces that the allocator does not map on their own
    kept = blocks[::1000]
    del blocks
    before = psutil.Process().memory_info().rss
    ReleaseMemoryHook().after_val_epoch(None)
    assert before - psutil.Process().memory_info().rss > 100 * 2**20
    assert len(kept) == 100


def test_other_allocators_are_left_alone(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr("ctypes.CDLL", missing)
    keep_freed_memory()
    ReleaseMemoryHook().after_val_epoch(None)
