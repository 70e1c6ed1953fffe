"""A long run that is killed again and again, and what it leaves behind."""

import json
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import psutil
from rich.console import Console
from rich.table import Table

from mmbivit import config_path
from mmbivit.datasets import make_digit_scenes

__all__ = ["Attempt", "problems", "read_attempts", "soak", "summary_table"]

FLOAT, BINARY = "digits/mask_rcnn_swin_float_quick", "digits/mask_rcnn_sibivit"
SAVE_EVERY, VALIDATE_EVERY = 25, 150  # iterations
SAMPLE_SECONDS = 5
WARM_UP_SECONDS = 30  # imports and the first batches
GRACE_SECONDS = 15  # workers of a killed process look every 5 seconds whether it lives
SETTLED_SECONDS = 300  # until caches are filled and a few validations have been
MOST_GROWTH = 200  # MB an hour, after that


@dataclass(frozen=True)
class Attempt:
    """One process from its start to its kill.

    Args:
        seconds: how long it lived.
        first: iteration that its log begins with; None if it was killed before.
        last: iteration that its log ends with.
        memory: resident MB of the process and its workers, by sample; the first half minute is left out.
        handles: open files of the process, by sample.
        workers: processes below it, by sample.
        left_processes: processes that were still there ``GRACE_SECONDS`` after the kill.
        left_shared: files in shared memory that were not there before.
    """

    seconds: float
    first: int | None
    last: int | None
    memory: Sequence[float]
    handles: Sequence[int]
    workers: Sequence[int]
    left_processes: int
    left_shared: int


def soak(out: Path, tools: Path, minutes: float, kill_minutes: float, seed: int, console: Console) -> list[Attempt]:
    """Train the demo's binary detector with its teacher, kill it at random and resume it, until the time is over.

    Args:
        out: folder of data, runs and ``soak.json``, which has all samples.
        tools: folder with ``train.py``.
        minutes: how long.
        kill_minutes: mean time between kills; times are uniform between a half and one and a half of it.
        seed: seed of the times.
        console: where progress is shown.

    Returns:
        The attempts in their order.

    Raises:
        RuntimeError: if training ends by itself, with the end of its log.
    """
    out.mkdir(parents=True, exist_ok=True)
    make_digit_scenes(out / "data", train=400, val=40)
    train = [sys.executable, str(tools / "train.py")]
    data = ["--data-root", str(out / "data")]
    float_dir = out / "float"
    with open(out / "float.log", "w") as log:
        line = [*train, str(config_path(FLOAT)), "--work-dir", str(float_dir), *data]
        subprocess.run(line, stdout=log, stderr=subprocess.STDOUT, check=True)
    teacher = float_dir / (float_dir / "last_checkpoint").read_text()
    # Enough iterations never to end, the switch in the first part, checkpoints and validation often.
    options = {
        "train_cfg.max_iters": 10**6,
        "train_cfg.val_interval": VALIDATE_EVERY,
        "custom_hooks.0.switch_iter": 10 * SAVE_EVERY,
        "default_hooks.checkpoint.interval": SAVE_EVERY,
        "default_hooks.logger.interval": 1,
    }
    line = [*train, str(config_path(BINARY)), "--work-dir", str(out / "run"), "--resume", *data]
    line += ["--float-checkpoint", str(teacher), "--cfg-options", *(f"{key}={value}" for key, value in options.items())]
    rng = random.Random(seed)
    end = time.monotonic() + 60 * minutes
    attempts: list[Attempt] = []
    while (left := end - time.monotonic()) > 0:
        lifetime = min(left, 60 * kill_minutes * rng.uniform(0.5, 1.5))
        attempts.append(_attempt(line, out / f"attempt_{len(attempts) + 1}.log", lifetime))
        console.print(_describe(len(attempts), attempts[-1]), highlight=False)
        (out / "soak.json").write_text(json.dumps([asdict(attempt) for attempt in attempts]))
    return attempts


def _attempt(line: Sequence[str], log: Path, lifetime: float) -> Attempt:
    shared = _shared_memory()
    memory, handles, workers = [], [], []
    start = time.monotonic()
    with open(log, "w") as file, subprocess.Popen(line, stdout=file, stderr=subprocess.STDOUT) as process:
        main = psutil.Process(process.pid)
        family = []
        while (age := time.monotonic() - start) < lifetime:
            if process.poll() is not None:
                raise RuntimeError(f"training ended by itself; its log is {log} and ends with\n{_tail(log)}")
            family = main.children(recursive=True)
            if age > WARM_UP_SECONDS:
                memory.append(sum(_resident_mb(member) for member in [main, *family]))
                handles.append(main.num_fds())
                workers.append(len(family))
            time.sleep(min(SAMPLE_SECONDS, max(0.0, lifetime - age)))
        process.send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(family, timeout=GRACE_SECONDS)
    iterations = [int(number) for number in re.findall(r"Iter\(train\) +\[ *(\d+)/", log.read_text(errors="replace"))]
    first, last = (iterations[0], iterations[-1]) if iterations else (None, None)
    left_shared = len(_shared_memory() - shared)
    return Attempt(time.monotonic() - start, first, last, memory, handles, workers, len(alive), left_shared)


def problems(attempts: Sequence[Attempt]) -> list[str]:
    """What is wrong with the attempts of a soak: what they left behind, growth, work that was lost or done twice."""
    found = []
    reached = 0
    for number, attempt in enumerate(attempts, 1):
        if attempt.left_processes or attempt.left_shared:
            found.append(
                f"attempt {number} left {attempt.left_processes} processes and {attempt.left_shared} files in memory"
            )
        if attempt.first is None:
            continue
        if not reached - SAVE_EVERY < attempt.first <= reached + 1:
            found.append(f"attempt {number} began with iteration {attempt.first}, after one that ended at {reached}")
        reached = attempt.last
        if (growth := _growth(attempt.memory)) is not None and growth > MOST_GROWTH:
            found.append(f"memory of attempt {number} grew by {growth:.0f} MB an hour")
    return found


def summary_table(attempts: Sequence[Attempt]) -> Table:
    """The attempts as a table."""
    table = Table("attempt", "minutes", "iterations", "memory (MB)", "MB/hour", "open files", "workers", "left behind")
    for number, a in enumerate(attempts, 1):
        growth = _growth(a.memory)
        table.add_row(
            str(number),
            f"{a.seconds / 60:.1f}",
            "none" if a.first is None else f"{a.first}-{a.last}",
            _range(a.memory),
            "too short" if growth is None else f"{growth:+.0f}",
            _range(a.handles),
            _range(a.workers),
            f"{a.left_processes} processes, {a.left_shared} shared",
        )
    return table


def _growth(memory: Sequence[float]) -> float | None:
    """Growth of the settled memory in MB an hour, from the medians of its first and last third.

    Validation needs more for a while, which a median leaves out. None for less than ten minutes of samples.
    """
    settled = memory[int((SETTLED_SECONDS - WARM_UP_SECONDS) / SAMPLE_SECONDS) :]
    third = len(settled) // 3
    if len(settled) * SAMPLE_SECONDS < 600:
        return None
    return (median(settled[-third:]) - median(settled[:third])) / ((len(settled) - third) * SAMPLE_SECONDS / 3600)


def read_attempts(out: Path) -> list[Attempt]:
    """Read what :func:`soak` has written.

    Raises:
        FileNotFoundError: if there is no soak in this folder.
    """
    file = out / "soak.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist: run tools/benchmarks/soak.py first, without --report")
    return [Attempt(**attempt) for attempt in json.loads(file.read_text())]


def _describe(number: int, attempt: Attempt) -> str:
    return f"attempt {number}: {attempt.seconds / 60:.1f} minutes, iterations {attempt.first} to {attempt.last}, killed"


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.0f}-{max(values):.0f}" if values else "-"


def _resident_mb(process: psutil.Process) -> float:
    try:
        return process.memory_info().rss / 2**20
    except psutil.NoSuchProcess:
        return 0.0


def _shared_memory() -> set[str]:
    folder = Path("/dev/shm")
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-15:])
