"""Errors that the user can mend, as one line instead of a traceback."""

import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["is_user_error", "user_errors"]

DEBUG_VARIABLE = "MMBIVIT_DEBUG"
_PACKAGE = str(Path(__file__).resolve().parents[1]) + os.sep


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
        print(f"error: {_message(error)}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def is_user_error(error: BaseException) -> bool:
    """Whether an error's message is written for the user and complete without a traceback.

    That holds for files that cannot be read or written, for the ``ValueError`` of our own checks, and for a ``type``
    in a config that no registry knows. A ``ValueError`` from anywhere else is a defect, whose traceback is needed.
    """
    if isinstance(error, OSError):
        return True
    if isinstance(error, ValueError):
        if str(error).startswith("Caught ValueError in DataLoader worker"):
            files = re.findall(r'^ *File "(.+)", line \d+', str(error), re.MULTILINE)
        else:
            files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
        return bool(files) and os.path.abspath(files[-1]).startswith(_PACKAGE)
    return isinstance(error, KeyError) and "registry. Please check" in str(error)


def _message(error: Exception) -> str:
    text = str(error.args[0]) if isinstance(error, KeyError) else str(error)
    # A data loader's worker sends its whole traceback as the message; the error itself is the last line.
    return text.strip().splitlines()[-1] if text.startswith("Caught ") else text
