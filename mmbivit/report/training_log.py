"""Reads the JSON logs that MMEngine wrote into a work dir."""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import mode
from typing import Any

import numpy as np

from mmbivit.analysis.training_log import Series, TrainingLog
from mmbivit.apis.config import load_config
from mmbivit.checks import UserError
from mmbivit.engine.sign_flips_hook import PREFIX

__all__ = ["read_training_log"]

_LOGS = "*/vis_data/scalars.json"
_COUNTERS = ("step", "iter", "epoch")

Entry = dict[str, Any]


def read_training_log(work_dir: str | Path) -> TrainingLog:
    """Read the logs of all runs in a work dir, ``<timestamp>/vis_data/scalars.json``.

    A resumed run repeats iterations: from its first one on, it replaces what earlier runs logged. A last line that a
    killed run left unfinished is left out. MMEngine logs metrics by epoch; they are put at the iteration that ended
    it, or, in a run by iterations, at the last one that was logged before.

    Args:
        work_dir: the ``--work-dir`` of training.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if it has no log, if a log is empty or damaged, or the config that MMEngine put beside it is.
    """
    work_dir = Path(work_dir)
    files = _find_logs(work_dir)
    runs = [_read_entries(file) for file in files]
    starts = [min((entry["step"] for entry in run if "iter" in entry), default=math.inf) for run in runs]
    ends = [min(starts[number + 1 :], default=math.inf) for number in range(len(runs))]
    counted = [e for run, end in zip(runs, ends, strict=True) for e in run if "iter" in e and e["step"] < end]
    epoch_length = _epoch_length(counted)
    train = _collect((entry["step"], entry) for entry in counted if PREFIX not in entry)
    flips = _collect((entry["step"], entry) for entry in counted if PREFIX in entry)
    metrics = _collect(_placed_metrics(runs, ends, epoch_length), leave_out=("time", "data_time"))
    if not (train or flips or metrics):
        raise UserError(f"the logs in work dir {work_dir} have no entry yet")
    validation = {f"val/{key}" if key in train else key: series for key, series in metrics.items()}
    return TrainingLog(work_dir, train, validation, flips, epoch_length, _switch(work_dir, files, epoch_length))


def _find_logs(work_dir: Path) -> list[Path]:
    if not work_dir.is_dir():
        raise FileNotFoundError(f"work dir {work_dir} does not exist, or is no folder")
    if not any(work_dir.iterdir()):
        raise UserError(f"work dir {work_dir} is empty; give the --work-dir of a training run")
    files = sorted(work_dir.glob(_LOGS), key=lambda file: file.parts[-3])
    if not files:
        raise UserError(f"work dir {work_dir} has no log of training, {_LOGS}; give the --work-dir of a training run")
    return files


def _read_entries(file: Path) -> list[Entry]:
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    entries = []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        if isinstance(entry, dict) and type(entry.get("step")) is int:
            entries.append(entry)
        elif number < len(lines):
            raise UserError(f"{file}, line {number} is damaged: expected a JSON object with 'step'; remove the line")
    return entries


def _epoch_length(entries: Iterable[Entry]) -> int | None:
    """Return how far apart the first entries of epochs are, which have the same place in each."""
    first: dict[int, int] = {}
    for entry in entries:
        if "epoch" in entry:
            first.setdefault(entry["epoch"], entry["step"])
    gaps = [first[epoch + 1] - step for epoch, step in first.items() if epoch + 1 in first]
    return mode(gaps) if gaps else None


def _placed_metrics(
    runs: Sequence[list[Entry]], ends: Sequence[float], epoch_length: int | None
) -> Iterator[tuple[int, Entry]]:
    """Yield the entries of validation that later runs do not replace, and their iterations."""
    last = 0  # iteration that was logged before
    for run, end in zip(runs, ends, strict=True):
        for entry in run:
            if "iter" in entry:
                last = entry["step"]
                continue
            if entry["step"] >= last > 0:  # LoggerHook(log_metric_by_epoch=False)
                place = entry["step"]
            else:
                place = entry["step"] * epoch_length if epoch_length else last
            if place < end:
                yield place, entry


def _collect(entries: Iterable[tuple[int, Entry]], leave_out: Sequence[str] = ()) -> dict[str, Series]:
    """Turn entries into a series for each key that has numbers."""
    points: dict[str, list[tuple[int, float]]] = {}
    for step, entry in entries:
        for key, value in entry.items():
            if type(value) in (int, float) and key not in _COUNTERS and key not in leave_out:
                points.setdefault(key, []).append((step, value))
    return {
        key: Series(np.array([step for step, _ in pairs]), np.array([value for _, value in pairs], dtype=float))
        for key, pairs in points.items()
    }


def _switch(work_dir: Path, logs: Sequence[Path], epoch_length: int | None) -> int | None:
    """Return the iterations of stage 1 by the config that MMEngine wrote for the newest run, if it has stages."""
    newest_first = sorted(work_dir.glob("*.py"), key=lambda file: file.stat().st_mtime, reverse=True)
    candidates = [logs[-1].with_name("config.py"), *newest_first]
    config = next((file for file in candidates if file.is_file() and file.read_text().strip()), None)
    hooks = (load_config(config).get("custom_hooks") or []) if config else []
    for hook in hooks:
        if str(hook.get("type")).endswith("DecoupledTrainingHook"):
            epochs = hook.get("switch_epoch")
            return epochs * epoch_length if epochs and epoch_length else hook.get("switch_iter")
    return None
