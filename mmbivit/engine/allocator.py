"""glibc's allocator, whose defaults ask for new pages in each iteration of training on a CPU, and for each image."""

import ctypes

__all__ = ["keep_freed_memory", "release_freed_memory"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_KEPT = 2**30


def keep_freed_memory() -> None:
    """Let glibc keep what is freed for the next tensors, in place of asking the system for zeroed pages each time.

    Does nothing where the allocator is another one.
    """
    _glibc("mallopt", _M_MMAP_THRESHOLD, _KEPT)
    _glibc("mallopt", _M_TRIM_THRESHOLD, _KEPT)


def release_freed_memory() -> None:
    """Let glibc give back the pages that are free now. Does nothing where the allocator is another one."""
    _glibc("malloc_trim", 0)


def _glibc(function: str, *args: int) -> None:
    try:
        getattr(ctypes.CDLL("libc.so.6"), function)(*args)
    except (AttributeError, OSError):  # not glibc
        return
