"""SI-BiViT for MMDetection: detectors with 1-bit Swin backbones, trained in two stages and run packed.

``import mmbivit`` is light: it imports neither torch nor any MM library. Sub-packages load on first use, as
``mmbivit.deploy`` or ``import mmbivit.deploy``; ``binary``, ``packed`` and ``deploy`` need only torch, the others
MMDetection.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from . import compat
from .checks import UserError

if TYPE_CHECKING:
    from mmengine.config import Config

__version__ = "0.1.0"
__all__ = ["UserError", "__version__", "check_dependencies", "config_path", "get_config"]

_SUBPACKAGES = (
    "analysis",
    "apis",
    "binary",
    "checkpoints",
    "compat",
    "datasets",
    "deploy",
    "distill",
    "doctor",
    "engine",
    "evaluation",
    "hub",
    "models",
    "packed",
    "report",
)
_WITHOUT_MMDET = ("binary", "checks", "compat", "datasets", "deploy", "doctor", "files", "hub", "packed", "uncaught")

check_dependencies = compat.check_dependencies


def config_path(name: str) -> Path:
    """Find one of the configs that ship with mmbivit.

    Args:
        name: path below ``configs/``, with or without ``.py``; the file's name alone is enough where it is unique.

    Raises:
        FileNotFoundError: if there is none, or several, of that name; the message lists what exists.
    """
    folder = _configs_folder()
    wanted = name if name.endswith(".py") else f"{name}.py"
    if (folder / wanted).is_file():
        return folder / wanted
    paths = sorted(path.relative_to(folder) for path in folder.rglob("*.py") if "_base_" not in path.parts)
    same_name = [path for path in paths if path.name == wanted]
    if len(same_name) == 1:
        return folder / same_name[0]
    known = [path.with_suffix("").as_posix() for path in paths]
    if same_name:
        hint = f"Which of these? {', '.join(path.with_suffix('').as_posix() for path in same_name)}"
    elif close := difflib.get_close_matches(wanted.removesuffix(".py"), known):
        hint = f"Did you mean {' or '.join(close)}?"
    else:
        hint = ""
    raise FileNotFoundError(f"mmbivit has no config '{name}'. {hint}\nIn {folder}:\n  " + "\n  ".join(known))


def get_config(name: str) -> Config:
    """Load one of the configs that ship with mmbivit, from a checkout or an installed wheel alike.

    Args:
        name: as for :func:`config_path`, e.g. ``"mask_rcnn_sibivit_swin_t"``.

    Returns:
        MMEngine's ``Config``, its bases merged.

    Raises:
        FileNotFoundError: if there is no such config.
        DependencyError: if MMEngine, or what the config's bases need, is not installed.
    """
    path = config_path(name)
    check_dependencies()
    from mmengine.config import Config

    return Config.fromfile(path)


def _configs_folder() -> Path:
    """``mmbivit/.mim/configs`` in a wheel (see ``setup.py``), ``configs`` beside the package in a checkout."""
    package = Path(__file__).resolve().parent
    wheel = package / ".mim" / "configs"
    return wheel if wheel.is_dir() else package.parent / "configs"


class _DependencyGuard(MetaPathFinder):
    """Checks the environment before the first sub-package that needs MMDetection is imported, then takes itself away.

    Without it, a user with a missing or old package gets whichever error its first use happens to end in.
    """

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        package, _, name = fullname.partition(".")
        if package != __name__ or name.partition(".")[0] in _WITHOUT_MMDET:
            return
        if name == "registry":
            # MMEngine imports it by itself and swallows errors of ours; it lets those of the next sub-package through
            compat.check_dependencies(["mmengine"])
            return
        compat.check_dependencies()
        sys.meta_path.remove(self)


def __getattr__(name: str) -> ModuleType:
    if name in _SUBPACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *_SUBPACKAGES})


compat.install()
sys.meta_path.insert(0, _DependencyGuard())
