"""Damaged and mutated content for the fuzz tests, and the limits under which it is read."""

import os
import pickletools
import random
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

__all__ = ["ROUNDS", "limits", "mutate_bytes", "mutate_value", "refused"]

# More rounds: MMBIVIT_FUZZ=100 pytest tests/robustness/test_fuzz_*.py takes a hundred times as many files.
ROUNDS = int(os.environ.get("MMBIVIT_FUZZ", "1"))
SECONDS, MEMORY = 20, 8 * 2**30
_OPCODES = bytes(ord(opcode.code) for opcode in pickletools.opcodes)
_VALUES = (None, True, False, 0, -1, 2**70, 1.5, float("nan"), float("inf"), "", "x", "\0", "../..", [], {}, [[]], b"x")


class TookTooLongError(BaseException):
    """Passes every ``except Exception``."""


@contextmanager
def limits() -> Iterator[None]:
    """Allow one file some seconds, and some memory beyond what the process has."""

    def stop(*_):
        raise TookTooLongError

    before, (soft, hard) = signal.signal(signal.SIGALRM, stop), resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as statm:
        size = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, hard))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def refused(read: Callable[[], object]) -> bool:
    """Read something damaged: it is refused by a clear error, or it is still whole."""
    try:
        with limits():
            read()
    except (ValueError, FileNotFoundError) as error:
        assert str(error).strip() and "\n" not in str(error), str(error)
        return True
    return False


def mutate_bytes(data: bytes, rng: random.Random, other: bytes = b"") -> bytes:
    """Flip bits, cut, insert, repeat, overwrite with numbers of extreme size, opcodes of pickle, or another file."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        at = rng.randrange(max(len(data), 1))
        size = rng.choice((1, 2, 4, 8, 64))
        kind = rng.randrange(8)
        if kind == 0 and data:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at : at + rng.choice((1, 8, 10**9))]
        elif kind == 2:
            data[at:at] = rng.randbytes(size)
        elif kind == 3:
            data[at : at + size] = rng.choice((b"\0", b"\xff", b"\x7f")) * size
        elif kind == 4:
            data[at:at] = data[at : at + size * 16]
        elif kind == 5 and data:
            data[at] = rng.choice(_OPCODES)
        elif kind == 6:
            start = rng.randrange(len(other) + 1)
            data[at : at + size * 16] = other[start : start + size * 16]
        elif kind == 7:
            end = data.rfind(b"PK\5\6")  # the directory at the end of a zip file, where its sizes are
            start = rng.randrange(max(end - 400, 0), len(data)) if end >= 0 else at
            data[start : start + 1] = rng.randbytes(1)
    return bytes(data)


def mutate_value(value: object, rng: random.Random) -> object:
    """Return nested dicts and lists with one entry changed, dropped, renamed, added or put elsewhere."""
    if isinstance(value, dict) and value and rng.random() < 0.95:
        key = rng.choice(list(value))
        changed = dict(value)
        kind = rng.randrange(10)
        if kind == 0:
            del changed[key]
        elif kind == 1:
            with suppress(TypeError):
                changed[key[:-1]] = changed.pop(key)
        elif kind == 2:
            changed[rng.choice(("x", "type", "_delete_", "_base_", "_scope_", 5))] = rng.choice(_VALUES)
        elif kind == 3:
            changed[key] = changed[rng.choice(list(value))]
        else:
            changed[key] = mutate_value(value[key], rng)
        return changed
    if isinstance(value, list) and value and rng.random() < 0.9:
        changed = list(value)
        at = rng.randrange(len(changed))
        changed[at] = mutate_value(changed[at], rng)
        return changed
    return rng.choice(_VALUES)
