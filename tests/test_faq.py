"""The questions quote messages as the code has them."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEADINGS = re.findall(r"^### `(.+)`$", (ROOT / "docs" / "faq.md").read_text(), re.MULTILINE)
TORCH = {"size mismatch for roi_head.bbox_head.fc_cls.weight"}
FIELD = "\0"


@cache
def messages() -> tuple[str, ...]:
    """All texts of the package, with a mark for each value that is put in."""
    found = []
    for file in (ROOT / "mmbivit").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                found.append("".join(v.value if isinstance(v, ast.Constant) else FIELD for v in node.values))
    return tuple(found)


def is_quoted(text: str) -> bool:
    """Whether a message has the words of a text in their order; ``...`` stands for anything."""
    pattern = re.compile(".*".join(map(re.escape, text.split("..."))), re.DOTALL)
    return any(pattern.search(message) for message in messages())


@pytest.mark.parametrize("heading", HEADINGS)
def test_the_code_says_so(heading):
    assert is_quoted(heading) != (heading in TORCH)


def test_what_is_not_said_is_seen():
    assert len(HEADINGS) > 25 and not is_quoted("... is of a float network: pack that first")
