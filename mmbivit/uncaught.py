"""What a command line tool says of errors that nothing catches. Tools import this module first, and nothing else does.

Importing torch and MMDetection takes seconds. An interrupt in that time, a package that is missing or a wrong
environment variable would be a traceback through half of the imports; with this module each is one message. Errors
after that are for :func:`mmbivit.apis.user_errors`, which the tools cannot have before the imports.
"""

import os
import sys
from types import TracebackType

from mmbivit.checks import UserError
from mmbivit.compat import DependencyError


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
    inner = None if trace is None else trace.tb_next
    is_ours = isinstance(error, (DependencyError, UserError))
    return is_ours and inner is not None and inner.tb_frame.f_code.co_name == "<module>"


sys.excepthook = _show
