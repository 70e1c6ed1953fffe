"""The long run that is killed, with a stand-in for training."""

import json
import sys
from dataclasses import asdict
from io import StringIO

import psutil
import pytest
from rich.console import Console

from mmbivit_benchmarks import soak as module
from mmbivit_benchmarks.soak import Attempt, problems, summary_table

# Logs two iterations, and has a child, which outlives it.
TRAINING = """
import subprocess, sys, time
child = subprocess.Popen(["sleep", "60"])
print("Iter(train) [ 126/1000] x", "Iter(train) [ 127/1000] x", sep=chr(10), flush=True)
time.sleep(60)
"""


def attempt(first=1, last=100, memory=(500.0,) * 30, left_processes=0, left_shared=0):
    return Attempt(180.0, first, last, memory, (30,) * 30, (1,) * 30, left_processes, left_shared)


def test_what_an_attempt_is(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "GRACE_SECONDS", 0.5)
    monkeypatch.setattr(module, "SAMPLE_SECONDS", 0.2)
    monkeypatch.setattr(module, "WARM_UP_SECONDS", 1)
    found = module._attempt([sys.executable, "-c", TRAINING], tmp_path / "log", lifetime=2.5)
    for process in psutil.process_iter(["cmdline"]):
        if process.info["cmdline"] == ["sleep", "60"]:
            process.kill()
    assert (found.first, found.last) == (126, 127)
    assert found.left_processes == 1 and set(found.workers) == {1}
    assert 3 <= len(found.memory) <= 10 and min(found.memory) > 1
    assert 2.5 <= found.seconds < 20
    assert problems([found])[0] == "attempt 1 left 1 processes and 0 files in memory"


def test_training_that_ends_by_itself_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match=r"(?s)training ended by itself; its log is .*log and ends with\nbroken"):
        module._attempt([sys.executable, "-c", "print('broken')"], tmp_path / "log", lifetime=30)


def test_problems():
    assert problems([attempt(), attempt(101, 150), attempt(126, 170), attempt(None, None), attempt(151, 160)]) == []
    # A checkpoint each 25 iterations: a kill while that of iteration 100 is saved leaves the one of 75.
    assert problems([attempt(), attempt(76, 160)]) == []
    assert problems([attempt(), attempt(75, 160)]) == ["attempt 2 began with iteration 75, after one that ended at 100"]
    assert len(problems([attempt(), attempt(102, 160)])) == 1
    assert len(problems([attempt(left_processes=1), attempt(101, left_shared=2)])) == 2
    # After five minutes (54 samples), 0.5 MB in each 5 seconds are 360 an hour; 200 are allowed. Peaks do not count.
    settled = (500.0,) * 54
    growing = tuple(500.0 + i / 2 for i in range(120))
    assert problems([attempt(memory=settled + growing)]) == ["memory of attempt 1 grew by 360 MB an hour"]
    assert problems([attempt(memory=settled + tuple(500.0 + i / 5 for i in range(120)))]) == []
    assert problems([attempt(memory=growing[:54] + (530.0, 530.0, 530.0, 900.0) * 30)]) == []
    assert problems([attempt(memory=settled + growing[:119])]) == []  # too short to tell


def test_an_earlier_run_is_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="run tools/benchmarks/soak.py first"):
        module.read_attempts(tmp_path)
    attempts = [attempt(), attempt(None, None)]
    (tmp_path / "soak.json").write_text(json.dumps([asdict(each) for each in attempts]))
    assert summary_table(module.read_attempts(tmp_path)).row_count == 2


def test_table():
    console = Console(file=StringIO(), width=140)
    console.print(summary_table([attempt(memory=(500.0, 520.0) * 15), attempt(None, None, memory=())]))
    text = console.file.getvalue()
    assert "1-100" in text and "500-520" in text and "too short" in text and "none" in text
