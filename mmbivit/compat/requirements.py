"""What mmbivit needs of its environment, and what is wrong with it: from package metadata, without importing anything.

MMDetection, MMCV and MMEngine exist as two families of distributions that own the same import folders: *onedl* (the
maintained continuation, our default) and *openmmlab* (the originals' last releases). One of them must be installed,
not both.
"""

from __future__ import annotations

import importlib.util
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata


@dataclass(frozen=True)
class Requirement:
    """A distribution that provides an import name.

    Attributes:
        module: the import name.
        distribution: what pip calls it.
        minimum: oldest version that works; empty for any.
        below: oldest version that does not work any more; empty for none.
        family: ``onedl`` or ``openmmlab`` for those of which one suffices, else empty.
    """

    module: str
    distribution: str
    minimum: str = ""
    below: str = ""
    family: str = ""

    def __str__(self) -> str:
        bounds = [f">={self.minimum}" if self.minimum else "", f"<{self.below}" if self.below else ""]
        return self.distribution + ",".join(bound for bound in bounds if bound)

    @property
    def pip_argument(self) -> str:
        """The requirement as a shell word."""
        return f'"{self}"' if self.minimum or self.below else self.distribution


@dataclass(frozen=True)
class Problem:
    """Something that will not work, and the command that mends it."""

    what: str
    mend: str


REQUIREMENTS: tuple[Requirement, ...] = (
    Requirement("torch", "torch", "2.6"),
    Requirement("torchvision", "torchvision"),
    Requirement("mmengine", "onedl-mmengine", "0.10.12", family="onedl"),
    Requirement("mmcv", "onedl-mmcv", "2.3", family="onedl"),
    Requirement("mmdet", "onedl-mmdetection", "3.5", "4", family="onedl"),
    Requirement("mmengine", "mmengine", "0.10.7", "1", family="openmmlab"),
    # mmcv-lite is mmcv without its compiled ops, as a wheel; mmcv itself has to be built, with setuptools < 81
    Requirement("mmcv", "mmcv-lite", "2.1.0", "2.2.0", family="openmmlab"),
    Requirement("mmcv", "mmcv", "2.1.0", "2.2.0", family="openmmlab"),
    Requirement("mmdet", "mmdet", "3.3.0", "4", family="openmmlab"),
    Requirement("timm", "timm", "1.0"),
    Requirement("numpy", "numpy"),
    Requirement("pycocotools", "pycocotools"),
    Requirement("safetensors", "safetensors"),
    Requirement("rich", "rich"),
    Requirement("matplotlib", "matplotlib"),
)

MODULES: tuple[str, ...] = tuple(dict.fromkeys(requirement.module for requirement in REQUIREMENTS))


class DependencyError(ImportError):
    """A package that mmbivit needs is missing or too old; the message says which, and what to type."""


def version_tuple(version: str) -> tuple[int, ...]:
    """The numbers of a version's release part: ``"2.4.0a0+git1"`` gives ``(2, 4, 0)``."""
    release = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(number) for number in release[0].split(".")) if release else ()


def installed_version(distribution: str) -> str | None:
    """Version of a distribution as pip knows it, or None if it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def is_importable(module: str) -> bool:
    """Whether Python would find a top-level module; it is not imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # in sys.modules without a spec
        return True


def providers(module: str) -> list[tuple[Requirement, str]]:
    """The installed distributions that provide ``module``, with their versions; more than one is a clash."""
    candidates = [requirement for requirement in REQUIREMENTS if requirement.module == module]
    installed = [(requirement, installed_version(requirement.distribution)) for requirement in candidates]
    return [(requirement, version) for requirement, version in installed if version is not None]


def installed_family() -> str:
    """The family to mend towards: ``openmmlab`` if only its distributions are there, else ``onedl``."""
    families = {requirement.family for module in ("mmengine", "mmcv", "mmdet") for requirement, _ in providers(module)}
    return "openmmlab" if families == {"openmmlab"} else "onedl"


def find_problems(modules: Iterable[str] = MODULES) -> list[Problem]:
    """Packages among ``modules`` (import names) that are missing, too old or too new."""
    problems = []
    for module in modules:
        installed = providers(module)
        if not installed and not is_importable(module):
            wanted = next(r for r in REQUIREMENTS if r.module == module and r.family in ("", installed_family()))
            problems.append(Problem(f"{module} is not installed", _install(wanted)))
        for requirement, version in installed:
            if not is_importable(module):
                what = f"{requirement.distribution} {version} is installed, but there is no module {module}"
                problems.append(Problem(what, _reinstall(requirement.pip_argument)))
            elif requirement.minimum and version_tuple(version) < version_tuple(requirement.minimum):
                what = f"{requirement.distribution} {version} is too old: {requirement.minimum} or newer is needed"
                problems.append(Problem(what, _install(requirement)))
            elif requirement.below and version_tuple(version) >= version_tuple(requirement.below):
                what = f"{requirement.distribution} {version} is too new: below {requirement.below} is needed"
                problems.append(Problem(what, _install(requirement)))
            elif requirement.distribution == "mmengine" and not is_importable("pkg_resources"):
                what = f"mmengine {version} needs pkg_resources, which newer setuptools no longer have"
                problems.append(Problem(what, 'pip install "setuptools<81"'))
    return problems


def find_clashes() -> list[Problem]:
    """Both families installed, be it over each other or mixed: they share folders and check each other's versions."""
    installed = [requirement for module in ("mmengine", "mmcv", "mmdet") for requirement, _ in providers(module)]
    if len({requirement.family for requirement in installed}) < 2:
        return []
    names = ", ".join(requirement.distribution for requirement in installed)
    # pip removes the files that the families share together with the unwanted one: the other must be laid anew
    unwanted = " ".join(requirement.distribution for requirement in installed if requirement.family == "openmmlab")
    wanted = " ".join(requirement.pip_argument for requirement in REQUIREMENTS if requirement.family == "onedl")
    return [
        Problem(
            f"two families of MMDetection are installed into the same folders: {names}",
            f"pip uninstall -y {unwanted} && {_reinstall(wanted)}",
        )
    ]


def check_dependencies(modules: Iterable[str] = MODULES) -> None:
    """Raise one readable error for everything among ``modules`` that is missing or of the wrong version.

    Warns if distributions of both families are installed, which may still work.

    Args:
        modules: import names, of :data:`MODULES`.

    Raises:
        DependencyError: naming each package and the commands that mend it.
    """
    problems = find_problems(modules)
    if problems:
        lines = [f"  - {problem.what}\n      {problem.mend}" for problem in problems]
        raise DependencyError(
            "mmbivit cannot use this environment:\n"
            + "\n".join(lines)
            + '\nEverything at once: pip install "mmbivit[onedl]"'
            + "\nThe whole picture:  python -m mmbivit.doctor"
        )
    for clash in find_clashes():
        warnings.warn(f"mmbivit: {clash.what}. To mend it: {clash.mend}", stacklevel=2)


def _install(requirement: Requirement) -> str:
    if requirement.distribution == "mmcv":  # exchanged for its other form, which needs no build
        return 'pip uninstall -y mmcv && pip install --force-reinstall --no-deps "mmcv-lite>=2.1.0,<2.2.0"'
    if requirement.module in ("torch", "torchvision"):  # a pair: each torchvision is built for one torch
        return 'pip install -U "torch>=2.6" torchvision'
    return f"pip install {requirement.pip_argument}"


def _reinstall(arguments: str) -> str:
    return f"pip install --force-reinstall --no-deps {arguments}"
