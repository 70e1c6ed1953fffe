"""The workflows and the citation fit their schemas, and what they name exists."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
VERSIONS = ["3.10", "3.11", "3.12", "3.13", "3.14"]


def check(schema: str, *files: Path) -> subprocess.CompletedProcess:
    """Compare files with a schema that comes with check-jsonschema."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", *map(str, files)]
    return subprocess.run(command, capture_output=True, text=True)


def test_workflows_fit_githubs_schema(tmp_path):
    assert [path.stem for path in WORKFLOWS] == ["docs", "lint", "tests", "wheels"]
    result = check("github-workflows", *WORKFLOWS)
    assert result.returncode == 0, result.stdout
    wrong = tmp_path / "wrong.yml"
    wrong.write_text(WORKFLOWS[0].read_text().replace("runs-on", "run-on"))
    assert "run-on" in check("github-workflows", wrong).stdout


def test_the_citation_fits_its_schema():
    result = check("citation-file-format", ROOT / "CITATION.cff")
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_what_workflows_run_exists(path):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    jobs = yaml.safe_load(path.read_text())["jobs"].values()
    commands = [step["run"] for job in jobs for step in job["steps"] if "run" in step]
    assert commands and all("timeout-minutes" in job for job in jobs)
    for command in commands:
        assert set(re.findall(r"\bmake ([a-z-]+)", command)) <= targets
        assert all((ROOT / file).exists() for file in re.findall(r"\b(?:tests|tools)/\S+\.py", command))


def test_the_versions_tested_are_those_promised():
    matrix = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())["jobs"]["tests"]["strategy"]["matrix"]
    assert matrix["python"] == VERSIONS
    assert {entry["python"] for entry in matrix["include"]} <= set(VERSIONS)
    setup = (ROOT / "setup.py").read_text()
    assert f'python_requires=">={VERSIONS[0]}"' in setup
    assert 'Programming Language :: Python :: 3.{minor}" for minor in range(10, 15)' in setup
    oldest = re.search(r'"torch>=([\d.]+)"', setup)[1]
    assert all(f"torch=={oldest}.*" in entry["pins"] for entry in matrix["include"])


def test_what_a_wheel_is_tested_by_exists():
    settings = (ROOT / "pyproject.toml").read_text()
    (script,) = re.findall(r'^test-command = "python \{project\}/(.+)"$', settings, re.MULTILINE)
    assert (ROOT / script).is_file()
