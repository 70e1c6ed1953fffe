"""What lets mmbivit run on the environments people have: the stand-in for mmcv's compiled ops, dependency checks.

Nothing here imports torch or an MM library before it is needed, so that ``import mmbivit`` stays light.
"""

from .mmcv_ops import install, is_standin
from .requirements import DependencyError, check_dependencies

__all__ = ["DependencyError", "check_dependencies", "install", "is_standin"]
