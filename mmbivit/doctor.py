"""``python -m mmbivit.doctor``: what is installed, what clashes, and how to mend it."""

import importlib
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from mmbivit.compat import mmcv_ops
from mmbivit.compat.requirements import MODULES, Problem, find_clashes, find_problems, is_importable, providers

__all__ = ["Report", "diagnose", "main"]


@dataclass(frozen=True)
class Report:
    """What :func:`diagnose` found.

    Args:
        versions: import name, and distribution with version, of everything mmbivit needs.
        facts: Python, device and where mmcv's operators come from.
        problems: what does not work, with the command that mends it.
    """

    versions: tuple[tuple[str, str], ...]
    facts: tuple[tuple[str, str], ...]
    problems: tuple[Problem, ...]


def diagnose() -> Report:
    """Look at the environment; nothing is changed, and broken packages become problems instead of exceptions."""
    problems = [*find_problems(), *find_clashes(), *_broken_packages()]
    operators, operator_problem = _mmcv_operators()
    facts = (
        ("Python", f"{platform.python_version()}, {platform.system()} {platform.machine()}"),
        ("device", _device()),
        ("mmcv operators", operators),
        ("packed networks", _packed_kernels()),
        ("checkpoints", _checkpoints()),
    )
    if operator_problem:
        problems.append(operator_problem)
    return Report(tuple((module, _describe(module)) for module in MODULES), facts, tuple(problems))


def _describe(module: str) -> str:
    found = [f"{requirement.distribution} {version}" for requirement, version in providers(module)]
    return ", ".join(found) or "not installed"


def _broken_packages() -> list[Problem]:
    """Packages that are there and raise on import: cv2 without libGL, a torchvision for another torch, an old ABI."""
    problems = []
    for module in (*MODULES, "cv2"):  # cv2 comes with mmcv
        if not is_importable(module):
            continue
        try:
            importlib.import_module(module)
        except Exception as error:  # a broken installation may raise anything
            what = f"{module} is installed but cannot be imported: {type(error).__name__}: {error}"
            problems.append(Problem(what, _mend_import(module)))
    return problems


def _mend_import(module: str) -> str:
    if module in ("torch", "torchvision"):  # built for each other
        return "pip install --force-reinstall torch torchvision"
    if module == "cv2":  # the headless build needs no graphics libraries of the system
        return "pip install --force-reinstall --no-deps opencv-python-headless"
    found = [f"{requirement.distribution}=={version}" for requirement, version in providers(module)]
    return f"pip install --force-reinstall --no-deps {found[0] if found else module}"


def _device() -> str:
    try:
        import torch
    except Exception as error:  # a broken installation may raise anything
        return f"unknown: torch cannot be imported ({error})"
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        return (
            f"{torch.cuda.device_count()} x {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
        )
    return f"CPU, {torch.get_num_threads()} threads of {os.cpu_count()} cores"


def _packed_kernels() -> str:
    try:
        from mmbivit.packed import kernels
    except Exception as error:  # torch or safetensors are missing or broken, which is reported above
        return f"unknown: mmbivit.packed cannot be imported ({error})"
    if kernels.available_paths() == (kernels.REFERENCE,):
        return "slow torch reference: no native kernels; install mmbivit again where there is a C++ compiler"
    return f"native kernels, {kernels.active_path()} of {', '.join(kernels.available_paths())}"


def _checkpoints() -> str:
    """Say whether MMEngine's own loader takes the checkpoints of training; the tools do not use it."""
    for requirement, version in providers("mmengine"):
        if requirement.family == "openmmlab":
            hint = "call mmbivit.apis.use_safe_loading() before Runner(resume=True) or DetInferencer"
            return f"mmengine {version} does not load its own with torch >= 2.6; the tools do. In Python, {hint}"
    return "MMEngine loads its own"


def _mmcv_operators() -> tuple[str, Problem | None]:
    """Say where mmcv's operators come from, and whether the compiled ones can be imported if they are there."""
    if not providers("mmcv"):
        return "mmcv is not installed", None
    compiled = mmcv_ops.find_compiled()
    if compiled is None:
        return "stand-in for mmcv._ext: NMS, RoIAlign and focal loss from torchvision and torch", None
    try:
        importlib.import_module(mmcv_ops.EXTENSION)
    except Exception as error:  # mostly ImportError of an ABI that does not match, but not only
        installed, version = providers("mmcv")[0]
        without_ops = "onedl-mmcv" if installed.family == "onedl" else "mmcv-lite"
        uninstall = f"pip uninstall -y {installed.distribution}"
        mend = (
            f"{uninstall} && pip install --no-deps --no-cache-dir {without_ops}=={version}"  # the cache may be broken
        )
        return "compiled, but broken", Problem(f"{compiled} cannot be imported: {error}", mend)
    return f"compiled: {compiled}", None


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report; returns 1 if there is a problem, else 0."""
    if arguments := list(sys.argv[1:] if argv is None else argv):
        print("usage: python -m mmbivit.doctor  (no options)")
        return 0 if arguments[0] in ("-h", "--help") else 2
    report = diagnose()
    _print(report)
    return 1 if report.problems else 0


def _print(report: Report) -> None:
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:  # a patient like any other
        lines = [f"{name}: {value}" for name, value in (*report.facts, *report.versions)]
        print("\n".join([*lines, *(f"PROBLEM {problem.what}\n  {problem.mend}" for problem in report.problems)]))
        return
    console = Console()
    table = Table(title="mmbivit doctor", show_header=False)
    for name, value in (*report.facts, *report.versions):
        table.add_row(name, value)
    console.print(table)
    for problem in report.problems:
        console.print(f"[red]✗[/] {problem.what}\n  [bold]{problem.mend}[/]", highlight=False, soft_wrap=True)
    if not report.problems:
        console.print("[green]✓[/] everything fits together")


if __name__ == "__main__":
    import mmbivit.uncaught  # noqa: F401  for an interrupt of the imports

    sys.exit(main())
