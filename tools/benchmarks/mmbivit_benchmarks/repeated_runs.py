"""Trainings with several seeds by ``tools/train.py``, each in a process with one thread, and what they logged."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from mmbivit import config_path
from mmbivit.analysis.training_log import read_runs
from mmbivit.checks import check_integer
from mmbivit.engine.run_settings import check_seed

__all__ = ["check_runs", "train_once"]


def check_runs(seeds: Sequence[int], jobs: int) -> None:
    """Raise a ValueError for a seed that numpy does not take, or for less than one run at a time."""
    check_integer("--jobs", jobs, 1)
    for seed in seeds:
        check_seed("--seeds", seed)


def train_once(
    train_tool: Path, config: str | Path, work_dir: Path, options: Sequence[object], metric: str
) -> list[dict[str, float]]:
    """Train a config, unless that is done already, and return its evaluations.

    Args:
        train_tool: path of ``tools/train.py``.
        config: name of a config of ours, or the path of any.
        work_dir: where the run goes; ``evaluations.json`` in it says that it is done.
        options: further options of the tool.
        metric: what every evaluation has, such as ``accuracy/top1``.

    Returns:
        The entries that MMEngine logged for the evaluations, in their order.

    Raises:
        RuntimeError: if the run fails or logs no evaluation; it names the log.
    """
    done = work_dir / "evaluations.json"
    if not done.is_file():
        work_dir.mkdir(parents=True, exist_ok=True)
        file = config if isinstance(config, Path) else config_path(config)
        line = [str(word) for word in (sys.executable, train_tool, file, "--work-dir", work_dir, *options)]
        with open(work_dir / "log.txt", "w") as log:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            result = subprocess.run(line, stdout=log, stderr=subprocess.STDOUT, env=environment, check=False)
        runs = list(read_runs(work_dir).values())
        evaluations = [entry for entry in runs[-1] if metric in entry] if runs else []
        if result.returncode or not evaluations:
            raise RuntimeError(f"training {config} failed or logged no {metric}; its log is {work_dir / 'log.txt'}")
        done.write_text(json.dumps(evaluations))
    return json.loads(done.read_text())
