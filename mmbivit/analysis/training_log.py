"""What a training run logged, as one history, read from the JSON logs that MMEngine wrote into a work dir."""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mode
from typing import Any, NoReturn

import numpy as np
from mmengine.config import Config

from mmbivit.checks import UserError, did_you_mean
from mmbivit.engine.sign_flips_hook import PREFIX

__all__ = ["Series", "TrainingLog", "read_runs", "read_training_log"]

_LOGS = "*/vis_data/scalars.json"
_COUNTERS = ("step", "iter", "epoch")

Entry = dict[str, Any]


@dataclass(frozen=True)
class Series:
    """One logged quantity.

    Args:
        steps: iterations after which it was logged, rising, ``(n,)``.
        values: what was logged, perhaps not finite, ``(n,)``.
    """

    steps: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class TrainingLog:
    """All that the runs in a work dir logged, one series a key.

    Args:
        work_dir: the folder.
        train: losses, learning rate, times and so on.
        validation: metrics; one whose name is also in ``train`` begins with ``val/``.
        flips: ``sign_flips`` and ``sign_flips/<layer>`` of :class:`mmbivit.SignFlipsHook`, from 0 to 1.
        epoch_length: iterations of an epoch; ``None`` where the log does not tell, as that of a run by iterations.
        switches: iterations before each training stage but the first; empty where training has no stages.
    """

    work_dir: Path
    train: dict[str, Series]
    validation: dict[str, Series]
    flips: dict[str, Series]
    epoch_length: int | None
    switches: tuple[int, ...]

    @property
    def last_step(self) -> int:
        """The last iteration of which anything was logged."""
        return max(
            int(series.steps[-1]) for part in (self.train, self.validation, self.flips) for series in part.values()
        )

    def series(self, key: str) -> Series:
        """Return what was logged under a key.

        Raises:
            ValueError: if there is no such key; the message lists those that there are.
        """
        known = {**self.train, **self.validation, **self.flips}
        if key not in known:
            keys = ", ".join(name for name in known if not name.startswith(f"{PREFIX}/"))
            raise UserError(f"the log in {self.work_dir} has no {key!r}{did_you_mean(key, known)}; it has {keys}")
        return known[key]


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
    logs = read_runs(work_dir)
    if not logs:
        _explain_missing_log(work_dir)
    runs = list(logs.values())
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
    return TrainingLog(work_dir, train, validation, flips, epoch_length, _switches(work_dir, list(logs), epoch_length))


def read_runs(work_dir: Path) -> dict[Path, list[Entry]]:
    """Read the entries of all logs in a work dir, by file, those of the newest run last.

    Raises:
        ValueError: if a log is damaged.
    """
    return {file: _read_entries(file) for file in sorted(work_dir.glob(_LOGS), key=lambda file: file.parts[-3])}


def _explain_missing_log(work_dir: Path) -> NoReturn:
    if not work_dir.is_dir():
        raise FileNotFoundError(f"work dir {work_dir} does not exist, or is no folder")
    if not any(work_dir.iterdir()):
        raise UserError(f"work dir {work_dir} is empty; give the --work-dir of a training run")
    raise UserError(f"work dir {work_dir} has no log of training, {_LOGS}; give the --work-dir of a training run")


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


def _switches(work_dir: Path, logs: Sequence[Path], epoch_length: int | None) -> tuple[int, ...]:
    """Return when stages begin by the config that MMEngine wrote for the newest run; nothing if it has none."""
    newest_first = sorted(work_dir.glob("*.py"), key=lambda file: file.stat().st_mtime, reverse=True)
    candidates = [logs[-1].with_name("config.py"), *newest_first]
    config = next((file for file in candidates if file.is_file() and file.read_text().strip()), None)
    for hook in _custom_hooks(config) if config else []:
        if str(hook.get("type")).endswith("DecoupledTrainingHook"):
            switches, length = hook.get("switch_epoch"), epoch_length
            if switches is None:
                switches, length = hook.get("switch_iter"), 1
            switches = switches if isinstance(switches, (list, tuple)) else [switches]
            return tuple(switch * length for switch in switches) if length else ()
    return ()


def _custom_hooks(config: Path) -> list[dict[str, Any]]:
    try:
        return Config.fromfile(config, import_custom_modules=False).get("custom_hooks") or []
    except Exception as error:  # a config is code, so anything may go wrong in it
        raise UserError(f"config {config} cannot be read: {type(error).__name__}: {error}") from error
