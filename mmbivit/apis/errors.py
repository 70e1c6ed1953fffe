"""Errors that the user can mend, as one line instead of a traceback."""

import io
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmbivit.checks import UserError

from .config_errors import REFUSALS, config_message

__all__ = ["UnusableImagesError", "error_message", "is_user_error", "user_errors"]

DEBUG_VARIABLE = "MMBIVIT_DEBUG"


class UnusableImagesError(UserError):
    """Some images could not be used, or none could; the others were predicted first.

    Args:
        results: what would have been returned without them.
        problems: by file, a line that names it and says what is wrong.
    """

    def __init__(self, results: list[Any], problems: dict[Path, str]):
        super().__init__("\n".join(problems.values()))
        self.results, self.problems = results, problems


@contextmanager
def user_errors(debug: bool = False) -> Iterator[None]:
    """Print errors that the user can mend to stderr, without a traceback, and exit with status 1.

    Other errors pass. So does everything with ``debug`` or the environment variable ``MMBIVIT_DEBUG=1``.
    """
    try:
        yield
    except Exception as error:
        if debug or os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0") or not is_user_error(error):
            raise
        messages = error.problems.values() if isinstance(error, UnusableImagesError) else [error_message(error)]
        for message in messages:
            print(f"error: {message}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def is_user_error(error: BaseException) -> bool:
    """Whether an error's message is written for the user and complete without a traceback.

    That holds for our own :class:`mmbivit.UserError`, for files that cannot be read or written, for losses and
    gradients that are no numbers (``FloatingPointError``), and for a part of a config that cannot be built: of an
    unknown ``type``, with a key that its class does not take, or with a value that MMEngine or torch refuses. Anything
    else is a defect, whose traceback is needed.
    """
    if isinstance(error, (UserError, OSError, FloatingPointError)):
        return True
    return isinstance(error, REFUSALS) and config_message(error) is not None


def error_message(error: Exception) -> str:
    """Return what a user is told of an error for which :func:`is_user_error` holds."""
    if not isinstance(error, UserError) and isinstance(error, REFUSALS):
        return config_message(error) or str(error)
    if isinstance(error, OSError) and error.errno is not None and error.filename is None:
        return f"{error}{_file_at_hand(error)}"
    text = str(error)
    # A data loader's worker sends its whole traceback as the message; the error itself is the last line.
    last = text.strip().splitlines()[-1].removeprefix("mmbivit.checks.UserError: ") if text else text
    return last if text.startswith("Caught ") else text


def _file_at_hand(error: OSError) -> str:
    """Return the file that was written or read, which errors after the opening do not know, as on a full disk."""
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        for value in frame.f_locals.values():
            if isinstance(value, io.IOBase) and isinstance(name := getattr(value, "name", None), str | os.PathLike):
                return f": {str(name)!r}"
    return ""
