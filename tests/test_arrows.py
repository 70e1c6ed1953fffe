"""The floors of the package: no module imports one above it, not even inside a function, and none in a circle."""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "mmbivit"

# From the roof down; what stands in one row does not import each other. Some are yet to be built.
FLOORS = (
    ("doctor",),
    ("demo",),
    ("report", "serve"),
    ("apis", "hub"),
    ("analysis",),
    ("deploy",),
    ("engine",),
    ("datasets",),
    ("distill",),
    ("evaluation", "timm"),
    ("models",),
    ("checkpoints",),
    ("packed",),
    ("binary",),
    ("registry",),
    ("files", "uncaught"),
    ("",),  # the package itself, mmbivit/__init__.py
    ("checks", "compat"),
)
HEIGHT = {name: len(FLOORS) - i for i, floor in enumerate(FLOORS) for name in floor}

# What points upwards, and modules in circles, until that is mended: take off what is; add nothing.
KNOWN_UPWARD: set[tuple[str, str]] = set()
KNOWN_CIRCULAR: set[str] = set()


def modules(package: Path) -> dict[str, Path]:
    """Return the files of a package by the names of their modules below it; its own is ``''``."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, known: set[str], package: str = "mmbivit") -> Iterator[str]:
    """Yield the modules of the package that a file imports: at its top, in functions, relative, for type checks."""
    inside = [package, *filter(None, name.split("."))]
    if path.name != "__init__.py":
        inside.pop()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = inside[: len(inside) + 1 - node.level] if node.level else []
            stem = ".".join([*base, *filter(None, [node.module])])
            wanted = [f"{stem}.{alias.name}" for alias in node.names]
        else:
            continue
        for full in wanted:
            first, _, rest = full.partition(".")
            if first != package:
                continue
            # `from mmbivit.x import y` names a module y, or something in x
            yield rest if rest in known else rest.rpartition(".")[0]


def graph(package: Path = PACKAGE) -> dict[str, set[str]]:
    """Return what each module imports of its package."""
    files = modules(package)
    return {name: set(imports(name, path, set(files), package.name)) - {name} for name, path in files.items()}


def circular(edges: dict[str, set[str]]) -> set[str]:
    """Return the modules that import themselves, through whatever is between."""

    def reached(start: str) -> set[str]:
        seen, waiting = set(), [start]
        while waiting:
            following = edges[waiting.pop()] - seen
            seen |= following
            waiting += following
        return seen

    return {name for name in edges if name in reached(name)}


def upward(edges: dict[str, set[str]]) -> set[tuple[str, str]]:
    """Return the imports that do not point downwards, or to the same sub-package."""
    found = set()
    for name, wanted in edges.items():
        for other in wanted:
            floor, other_floor = name.partition(".")[0], other.partition(".")[0]
            if floor != other_floor and HEIGHT[floor] <= HEIGHT[other_floor]:
                found.add((name, other))
    return found


def test_every_sub_package_has_its_floor():
    assert {name.partition(".")[0] for name in graph()} <= HEIGHT.keys()


def test_arrows_point_down():
    found = upward(graph())
    assert not found - KNOWN_UPWARD, "new upward imports"
    assert not KNOWN_UPWARD - found, "no upward imports any more: take them off KNOWN_UPWARD"


def test_no_circles():
    found = circular(graph())
    assert not found - KNOWN_CIRCULAR, "modules in new circles"
    assert not KNOWN_CIRCULAR - found, "not in a circle any more: take them off KNOWN_CIRCULAR"


def test_imports_of_every_kind_are_seen(tmp_path):
    package = tmp_path / "toy"
    files = {
        "__init__.py": "",
        "low/__init__.py": "from .b import thing",
        "low/a.py": "def f():\n    from toy.low import b\n    import toy.high.c",
        "low/b.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..high.c import C",
        "high/__init__.py": "",
        "high/c.py": "from .. import low\nfrom . import d as renamed\nimport os.path",
        "high/d.py": "",
    }
    for name, text in files.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)

    edges = graph(package)

    assert edges == {
        "": set(),
        "low": {"low.b"},
        "low.a": {"low.b", "high.c"},
        "low.b": {"high.c"},
        "high": set(),
        "high.c": {"low", "high.d"},
        "high.d": set(),
    }
    assert circular(edges) == {"low", "low.b", "high.c"}
