"""README and docs name what exists: files, modules, objects, and what a config may name by ``type``."""

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from mmbivit import binary, registry

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [*(ROOT / name for name in ("CONTRIBUTING.md", "README.md", "SECURITY.md")), *(ROOT / "docs").rglob("*.md")]
)
FOLDERS = ("mmbivit", "configs", "tools", "tests", "docs")


def registered() -> set[str]:
    found = set()
    for value in vars(registry).values():
        if isinstance(value, registry.Registry) and value.scope == "mmbivit":
            value.import_from_location()
            importlib.import_module("mmbivit.models.detection")  # which a look-up by name imports
            found |= value.module_dict.keys()
    return found


def exists(name: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    found = importlib.import_module("mmbivit")
    path = name.split(".")
    for i, part in enumerate(path[1:], start=2):
        if not hasattr(found, part):
            try:
                importlib.import_module(".".join(path[:i]))
            except ModuleNotFoundError:
                return False
        found = getattr(found, part)
    return True


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_names_and_paths_exist(page):
    text = page.read_text()
    types = registered()
    names = set(re.findall(r"\bmmbivit\.[A-Za-z_][\w.]*\w", text))
    assert not {name for name in names if not exists(name) and name.removeprefix("mmbivit.") not in types}
    paths = set(re.findall(rf"(?:^|[\s`(])((?:{'|'.join(FOLDERS)})/[\w./-]+\.(?:py|sh|md|cpp|h|inl))", text))
    assert not {path for path in paths if not (ROOT / path).exists()}
    links = {link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link}
    assert not {link for link in links if link and not (page.parent / link).exists()}


def test_what_does_not_exist_is_seen():
    assert exists("mmbivit.deploy.pack") and not exists("mmbivit.deploy.unpack") and not exists("mmbivit.nothing.pack")


def options_of(tool: str) -> set[str]:
    """The options that a tool's parsers name, with those that several tools share."""
    tool = re.sub(r"(dist|slurm)_(train|test)\.sh", r"\2.py", tool)  # which hand their options on
    sources = [ROOT / tool, ROOT / "mmbivit/apis/options.py"]
    if "benchmarks" in tool:
        sources += (ROOT / "tools/benchmarks/mmbivit_benchmarks").rglob("*.py")
    return {"--help", *re.findall(r'"(--[a-z][\w-]*)"', "".join(source.read_text() for source in sources))}


def commands(text: str) -> list[tuple[str, str]]:
    """The tools that the blocks of a page call, each with the rest of its line without the comment."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = [line.partition(" #")[0] for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    calls = [re.search(r"\b(tools/[\w/]+\.(?:py|sh))\b(.*)", line) for line in lines]
    return [(call[1], call[2]) for call in calls if call]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_have_options_that_exist(page):
    unknown = {}
    for tool, rest in commands(page.read_text()):
        if wrong := set(re.findall(r"(?<=\s)--[a-z][\w-]*", rest)) - options_of(tool):
            unknown[tool] = wrong
    assert not unknown


def test_an_option_that_does_not_exist_is_seen():
    ((tool, rest),) = commands("```bash\npython tools/train.py CONFIG \\\n    --amp  # --comment\n```")
    assert "--amp" in rest and "--comment" not in rest
    assert "--amp" in options_of(tool) and "--work-dir" in options_of(tool) and "--apm" not in options_of(tool)


def test_the_recipe_of_the_page_builds_a_network_that_binarizes(monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "adding_recipe.md").read_text(), re.DOTALL)
    monkeypatch.setattr(binary, "RECIPES", binary.RECIPES.copy())
    names: dict[str, Any] = {}
    exec(code, names)
    layer = binary.RECIPES["scaled"].build_linear(8, 4)
    assert type(layer.input_quantizer) is names["ScaledSign"]
    assert layer.input_quantizer(torch.tensor([-0.5, 0.0, 2.0])).tolist() == [-1, 1, 1]
