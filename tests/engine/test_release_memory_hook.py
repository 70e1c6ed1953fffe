"""Free memory goes back to the system after validation."""

import platform

import psutil
import pytest

from mmbivit.engine import ReleaseMemoryHook


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc alone")
def test_memory_between_blocks_in_use_is_returned():
    blocks = [bytes(2000) for _ in range(100_000)]  # 200 MB, in pieces that the allocator does not map on their own
    kept = blocks[::1000]
    del blocks
    before = psutil.Process().memory_info().rss
    ReleaseMemoryHook().after_val_epoch(None)
    assert before - psutil.Process().memory_info().rss > 100 * 2**20
    assert len(kept) == 100


def test_other_systems_are_left_alone(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr("ctypes.CDLL", missing)
    ReleaseMemoryHook().after_val_epoch(None)
