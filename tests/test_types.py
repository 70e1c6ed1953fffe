"""What `make lint` checks by mypy: every place that it is told to pass over says why."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
IGNORE = re.compile(r"# type: ignore\[[a-z, -]+\]  # \S.*")


def unexplained(text: str) -> list[str]:
    return [line for line in text.splitlines() if "# type: ignore" in line and not IGNORE.search(line)]


def test_every_ignored_error_is_named_and_explained():
    files = [path for path in (ROOT / "mmbivit").rglob("*.py") if "type: ignore" in path.read_text()]
    assert files
    assert not {str(path): lines for path in files if (lines := unexplained(path.read_text()))}


@pytest.mark.parametrize("comment", ["# type: ignore", "# type: ignore[misc]", "# type: ignore  # because"])
def test_what_is_not_explained_is_found(comment):
    assert unexplained(f"x = 1  {comment}") and not unexplained("x = 1  # type: ignore[misc]  # because")
