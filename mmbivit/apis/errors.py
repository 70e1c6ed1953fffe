"""Errors that the user can mend, as one line instead of a traceback."""

import inspect
import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import mmengine
from mmengine.registry import Registry

from mmbivit.checks import did_you_mean

__all__ = ["UnusableImagesError", "error_message", "is_user_error", "user_errors"]

DEBUG_VARIABLE = "MMBIVIT_DEBUG"
_PACKAGE = str(Path(__file__).resolve().parents[1]) + os.sep
_MMENGINE = str(Path(mmengine.__file__).resolve().parent) + os.sep
_UNKNOWN_KEY = re.compile(r"(\w+)(?:\.__init__)?\(\) got an unexpected keyword argument '(\w+)'")


class UnusableImagesError(ValueError):
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

    That holds for files that cannot be read or written, for the ``ValueError`` of our own checks, for losses and
    gradients that are no numbers (``FloatingPointError``), and for a part of a config that no registry can build: of
    an unknown ``type``, or with a key that its class does not take. A ``ValueError`` from anywhere else is a defect,
    whose traceback is needed.
    """
    if isinstance(error, (OSError, FloatingPointError)):
        return True
    if isinstance(error, ValueError):
        if str(error).startswith("Caught ValueError in DataLoader worker"):
            files = re.findall(r'^ *File "(.+)", line \d+', str(error), re.MULTILINE)
        else:
            files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
        return bool(files) and os.path.abspath(files[-1]).startswith(_PACKAGE)
    return isinstance(error, (KeyError, TypeError)) and _config_message(error) is not None


def error_message(error: Exception) -> str:
    """Return what a user is told of an error for which :func:`is_user_error` holds."""
    if isinstance(error, (KeyError, TypeError)):
        return _config_message(error)
    text = str(error)
    # A data loader's worker sends its whole traceback as the message; the error itself is the last line.
    return text.strip().splitlines()[-1].removeprefix("ValueError: ") if text.startswith("Caught ") else text


def _config_message(error: KeyError | TypeError) -> str | None:
    """Return what is wrong with the part of a config that MMEngine could not build, if that is the error."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    text = " ".join(str(error.args[0]).split()) if error.args else ""
    in_build = bool(frames) and frames[-1].f_code.co_name == "build_from_cfg"
    if in_build and "is not in the" in text:
        built = frames[-1].f_locals
        hint = did_you_mean(built["obj_type"], _types(built["registry"]))
        return text.partition(". Please check")[0] + (hint or ": check its spelling, or custom_imports of what has it")
    if (match := _UNKNOWN_KEY.search(text)) and _is_of_config(frames, match[2]):
        return f"{text}{_allowed(frames, *match.groups())}"
    return text if in_build and not match else None


def _types(registry: Registry) -> Iterator[str]:
    """Return the names that could stand in a config, with and without the scope."""
    for scope in (registry.root, *registry.root.children.values()):
        for name in scope.module_dict:
            yield from (name, f"{scope.scope}.{name}")


def _is_of_config(frames: list[FrameType], key: str) -> bool:
    """Whether a key was passed on by MMEngine out of a dict, as it does with configs."""
    values = (
        value for frame in frames if frame.f_code.co_filename.startswith(_MMENGINE) for value in frame.f_locals.values()
    )
    return any(isinstance(value, dict) and key in value for value in values)


def _allowed(frames: list[FrameType], name: str, key: str) -> str:
    """Return the keys that a class takes, if it is the one that a registry was building."""
    for cls in (frame.f_locals.get("obj_cls") for frame in reversed(frames)):
        if inspect.isclass(cls) and cls.__name__ == name:
            keys = [key for key in inspect.signature(cls).parameters if key not in ("args", "kwargs")]
            return f"; allowed: {', '.join(keys)}{did_you_mean(key, keys)}"
    return ""
