"""``python -m mmbivit.doctor``: what is installed, what clashes, and how to mend it."""

import importlib
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from mmbivit.compat import mmcv_ops
from mmbivit.compat.requirements import MODULES, Problem, find_clashes, find_problems, providers

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
    problems = [*find_problems(), *find_clashes()]
    operators, operator_problem = _mmcv_operators()
    facts = (
        ("Python", f"{platform.python_version()}, {platform.system()} {platform.machine()}"),
        ("device", _device()),
        ("mmcv operators", operators),
    )
    if operator_problem:
        problems.append(operator_problem)
    return Report(tuple((module, _describe(module)) for module in MODULES), facts, tuple(problems))


def _describe(module: str) -> str:
    found = [f"{requirement.distribution} {version}" for requirement, version in providers(module)]
    return ", ".join(found) or "not installed"


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
        family, version = providers("mmcv")[0]
        mend = f"pip install --force-reinstall --no-deps {family.distribution}=={version}"
        return "compiled, but broken", Problem(f"{compiled} cannot be imported: {error}", mend)
    return f"compiled: {compiled}", None


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report; returns 1 if there is a problem, else 0."""
    if arguments := list(sys.argv[1:] if argv is None else argv):
        print("usage: python -m mmbivit.doctor  (no options)")
        return 0 if arguments[0] in ("-h", "--help") else 2
    report = diagnose()
    console = Console()
    table = Table(title="mmbivit doctor", show_header=False)
    for name, value in (*report.facts, *report.versions):
        table.add_row(name, value)
    console.print(table)
    for problem in report.problems:
        console.print(f"[red]✗[/] {problem.what}\n  [bold]{problem.mend}[/]", highlight=False, soft_wrap=True)
    if not report.problems:
        console.print("[green]✓[/] everything fits together")
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
