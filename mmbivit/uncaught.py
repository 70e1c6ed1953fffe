"""What a command line tool says of errors that nothing catches. Tools import this module first, and nothing else does.

Importing torch and MMDetection takes seconds. An interrupt in that time, a package that is missing or a wrong
environment variable would be a traceback through half of the imports; with this module each is one message. Errors
after that are for :func:`mmbivit.apis.user_errors`, which the tools cannot have before the imports.
"""

import os
import sys
from pathlib import Path
from types import TracebackType

from mmbivit.compat import DependencyError

_PACKAGE = str(Path(__file__).resolve().parent) + os.sep


def _show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    debug = "--debug" in sys.argv or os.environ.get("MMBIVIT_DEBUG", "0") not in ("", "0")
    if isinstance(error, KeyboardInterrupt) and not debug:
        print("interrupted", file=sys.stderr)
    elif _is_user_error_of_imports(error, trace) and not debug:
        print(f"error: {error}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def _is_user_error_of_imports(error: BaseException, trace: TracebackType | None) -> bool:
    """Whether an error is one of our own checks, while the tool imports its modules."""
    if not isinstance(error, (DependencyError, ValueError)) or trace is None or trace.tb_next is None:
        return False
    importing = trace.tb_next.tb_frame.f_code.co_name == "<module>"
    while trace.tb_next is not None:
        trace = trace.tb_next
    return importing and os.path.abspath(trace.tb_frame.f_code.co_filename).startswith(_PACKAGE)


sys.excepthook = _show
