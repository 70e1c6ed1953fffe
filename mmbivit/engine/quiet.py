"""Messages of libraries that are not about the user's run, each silenced by its exact text.

What can be avoided by an option is avoided where it would come from, and not listed here. A message belongs here if it
comes from the inside of a library, whatever the user does, and there is nothing that the user could change about it.
"""

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mmengine.logging import MMLogger
from mmengine.logging import logger as mmengine_logger

__all__ = ["quiet", "quiet_logger"]

# Warnings: how the text begins, and the module that it comes from where that is certain.
_WARNINGS = (
    # MMDetection imports all of its metrics, also the one that needs this package; a config that names it still fails.
    ("faster_coco_eval is not installed, metrics will not be computed", r"mmdet\.evaluation\.metrics\."),
    # A detection reaches the border of its image, or a mask beyond it: the visualizer draws what lies inside.
    (r"Warning: The (bbox|polygon|text) is out of bounds,", r"mmengine\.visualization\.visualizer$"),
    # MMEngine 0.10.7 asks setuptools for installed packages; it is reported of importlib, which loads it again.
    ("pkg_resources is deprecated as an API", ""),
    # MMEngine's loop steps schedules every iteration, and the optimizer less often where gradients are accumulated.
    (r"Detected call of `scheduler\.step\(\)` before `optimizer\.step\(\)`", r"mmengine\.optim\.scheduler\."),
    # MMEngine gives this to torch's DDP for every model.
    ("`broadcast_buffers` is deprecated", r"mmengine\.model\.wrappers\."),
)
# Records of the runner's logger: MMEngine's hooks make a FileClient to know where files go, and what writes the file of
# tools/test.py --out has no metrics whose names could begin with a prefix.
_RECORDS = re.compile(
    r'"FileClient" will be deprecated in future\. Please use io functions in https://\S+'
    r'|"HardDiskBackend" is the alias of "LocalBackend" and the former will be deprecated in future\.'
    r"|The prefix is not set in metric class Dump(Det)?Results\."
)
# MMDetection (onedl-mmdetection) prints this of data sets that need a package of its own; print_log calls print().
_PRINTED = "Could not import OneDL. Skipping OneDL datasets."


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out warnings and printed lines that are not about the user's run; all others pass."""
    before = vars(mmengine_logger).get("print", print)
    with warnings.catch_warnings():
        for message, module in _WARNINGS:
            warnings.filterwarnings("ignore", message, module=module)
        mmengine_logger.print = _print_others
        try:
            yield
        finally:
            mmengine_logger.print = before


def quiet_logger(logger: MMLogger) -> None:
    """Leave out of a logger what is not about the user's run; all else passes."""
    logger.addFilter(_is_other_record)


def _is_other_record(record: logging.LogRecord) -> bool:
    return _RECORDS.fullmatch(record.getMessage()) is None


def _print_others(*values: Any, **options: Any) -> None:
    if values != (_PRINTED,):
        print(*values, **options)
