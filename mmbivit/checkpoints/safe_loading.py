"""Reading checkpoint files of strangers: nothing in them runs, unless the user trusts a file by its name."""

import argparse
import logging
import pickle
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer, print_log
from torch import Tensor

from mmbivit.checks import UserError

__all__ = ["read_checkpoint", "trusting"]

# Files whose code may run, by resolved path, and whether that has been said.
_trusted: ContextVar[dict[Path, bool] | None] = ContextVar("trusted", default=None)


def read_checkpoint(path: Path, name: str, map_location: Any) -> Any:
    """Read a file with ``torch.load``: tensors, plain containers, timm's options and MMEngine's log history.

    Args:
        path: the file.
        name: what messages call it.
        map_location: where tensors go.

    Raises:
        ValueError: if the file is damaged, would take more memory than it has bytes, or holds anything else and is not
            trusted (see :func:`trusting`).
    """
    trusted = _is_trusted(path, name)
    try:
        if not trusted:
            _check_archive(path)
        with torch.serialization.safe_globals(_safe_globals()):
            content = torch.load(path, map_location=map_location, weights_only=not trusted)
        if not trusted:
            _check_tensors(content, path.stat().st_size)
    except Exception as error:  # of a file that may hold anything, reading may raise anything
        if isinstance(error, pickle.UnpicklingError) and not trusted:
            hint = "if the command line names the file, --trust-checkpoint loads it with any code in it"
            raise UserError(f"{name} is no checkpoint that can be loaded safely: {_reason(error)}; {hint}") from error
        raise UserError(f"{name} is no checkpoint, or not all of one: {_reason(error)}") from error
    return content


@contextmanager
def trusting(paths: Iterable[Path]) -> Iterator[None]:
    """Load these files with all that they hold, for a while: they can run any code."""
    token = _trusted.set(dict.fromkeys((path.resolve() for path in paths), False))
    try:
        yield
    finally:
        _trusted.reset(token)


def _is_trusted(path: Path, name: str) -> bool:
    trusted, path = _trusted.get() or {}, path.resolve()
    if path not in trusted:
        return False
    if not trusted[path]:
        trusted[path] = True
        text = f"--trust-checkpoint: {name} is loaded with all that it holds, and can run any code on this machine."
        print_log(text, "current", logging.WARNING)
    return True


def _reason(error: Exception) -> str:
    """Return the line of an error that says what is wrong with the file, without torch's advice to allow it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    advice = ("Weights only load failed", "Check the documentation", "(1)", "(2)", "Please file an issue")
    telling = [line for line in lines if not line.startswith(advice)] or lines
    reason = telling[0].removeprefix("WeightsUnpickler error: ").partition(". Please use ")[0].rstrip(".")[:300]
    is_sentence = isinstance(error, (pickle.UnpicklingError, OSError, RuntimeError, ValueError))
    return reason if is_sentence else f"{type(error).__name__} {reason}"


def _check_archive(path: Path) -> None:
    """Refuse a zip file that unpacks to more than it has bytes; ``torch.save`` does not compress."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\3\4":
            return  # of torch < 1.6, which is no archive, or none at all
    with zipfile.ZipFile(path) as archive:
        size = sum(entry.file_size for entry in archive.infolist())
    if size > path.stat().st_size:
        raise UserError(f"it is compressed, and unpacks to {size} bytes; torch.save does not compress")


def _check_tensors(content: Any, file_size: int) -> None:
    """Refuse tensors that a few bytes describe as huge: the first copy of one would take all memory."""
    waiting, seen = [content], set()
    while waiting:
        item = waiting.pop()
        if isinstance(item, Tensor):
            if item.layout == torch.strided and item.nbytes > file_size:
                raise UserError(f"it has a tensor of {item.nbytes} bytes, more than the file")
        elif isinstance(item, (dict, list, tuple, set)) and id(item) not in seen:
            seen.add(id(item))
            waiting += item.values() if isinstance(item, dict) else item


def _safe_globals() -> list[Any]:
    """Return what checkpoints of MMEngine and timm hold beside tensors; none of it runs code when it is loaded.

    Stand-ins take the place of what a file could misuse: NumPy makes arrays of Python objects out of any bytes, and
    the state of a dtype lets arrays read and free memory of others; MMEngine's log history registers functions.
    """
    classes: tuple[type, ...] = (np.ndarray, *(type(np.dtype(name)) for name in _DTYPES))
    multiarray = np._core.multiarray if hasattr(np, "_core") else np.core.multiarray  # type: ignore[attr-defined]  # of NumPy 1
    return [
        (_history_method, "builtins.getattr"),
        (_History, f"{HistoryBuffer.__module__}.{HistoryBuffer.__qualname__}"),
        argparse.Namespace,
        # What may be filled, but not called: a name with a line break is none that a file can write.
        *((cls, f"\n{cls.__name__}") for cls in classes),
        (_empty_array, "numpy.ndarray"),
        (_plain_dtype, "numpy.dtype"),
        *((multiarray.scalar, f"{module}.scalar") for module in _MULTIARRAY),
        *((_empty_array, f"{module}._reconstruct") for module in _MULTIARRAY),
    ]


_MULTIARRAY = ("numpy._core.multiarray", "numpy.core.multiarray")
_DTYPES = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")


def _plain_dtype(name: str, *_: Any) -> np.dtype:
    """Return one of NumPy's own dtypes, which ignore the state that a file gives them."""
    if name not in _DTYPES:
        raise pickle.UnpicklingError(f"numpy.dtype({name!r}) is not allowed")
    return np.dtype(name)


def _empty_array(*_: Any) -> np.ndarray:
    """Make an array without content, as files of NumPy do before they fill it, but of no other shape and dtype."""
    return np.ndarray((0,), "b")


def _history_method(owner: type, name: str) -> Callable:
    """Stand in for ``getattr``, by which MMEngine's log history refers to its own statistics."""
    if owner is not _History or name not in ("min", "max", "current", "mean"):
        raise pickle.UnpicklingError(f"getattr({owner!r}, {name!r}) is not allowed")
    return getattr(HistoryBuffer, name)


class _History(HistoryBuffer):
    """MMEngine's log history, which becomes one of its own class when it has been filled with numbers alone."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        values = [state.get(key) for key in ("_log_history", "_count_history")]
        if not all(isinstance(value, np.ndarray) and value.ndim == 1 for value in values):
            raise pickle.UnpicklingError("a log history that does not hold two lists of numbers is not allowed")
        self.__class__ = HistoryBuffer
        self.__init__(*values, max_length=int(state.get("max_length", 1_000_000)))  # type: ignore[misc]  # of HistoryBuffer now
