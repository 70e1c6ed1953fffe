"""Runs that are killed at random and resumed equal runs that never were, bit for bit."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from mmbivit.checkpoints import load_checkpoint_file

SCRIPT = Path(__file__).with_name("killed_runs.py")


def differences(a: Any, b: Any, name: str) -> list[str]:
    """Names of what differs between two nested containers of tensors and numbers."""
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [name]
    if isinstance(a, dict):
        own = [f"{name}: {a.keys() ^ b.keys()}"] if a.keys() != b.keys() else []
        return own + [found for key in a.keys() & b.keys() for found in differences(a[key], b[key], f"{name}.{key}")]
    if isinstance(a, list | tuple):
        own = [name] if len(a) != len(b) else []
        return own + [f for i, (x, y) in enumerate(zip(a, b, strict=False)) for f in differences(x, y, f"{name}.{i}")]
    return [] if a == b else [name]


def running(script: Path) -> list[str]:
    """Processes that run a script, workers of its data loaders among them."""
    lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    return [line.decode().replace("\0", " ") for line in lines if str(script).encode() in line]


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks, and reads /proc")
def test_killed_runs_equal_runs_without_interruption(tmp_path):
    """Before, at and after the switch; by epochs and iterations; EMA; accumulation; workers."""
    done = subprocess.run([sys.executable, str(SCRIPT), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    kills = json.loads(done.stdout.splitlines()[-1])
    assert sum(map(len, kills.values())) >= 20
    for number, name in enumerate(kills):
        whole, killed = (tmp_path / f"{number}_{run}" for run in ("whole", "killed"))
        pointer = (whole / "last_checkpoint").read_text()
        assert (killed / "last_checkpoint").read_text() == pointer
        a, b = (load_checkpoint_file(str(folder / pointer)) for folder in (whole, killed))
        for key in ("state_dict", "ema_state_dict", "optimizer", "param_schedulers"):
            assert (key in a) == (key in b) == (key != "ema_state_dict" or "EMA" in name)
            assert differences(a.get(key), b.get(key), key) == [], name
        assert int(a["state_dict"]["backbone.training_stage"]) == 2
        assert sorted(p.name for p in whole.glob("*.p*t*")) == sorted(p.name for p in killed.glob("*.p*t*"))
    deadline = time.monotonic() + 30  # workers look every 5 seconds whether their process lives
    while running(SCRIPT) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert running(SCRIPT) == []
