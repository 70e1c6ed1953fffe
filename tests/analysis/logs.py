"""Logs as MMEngine writes them, with numbers chosen by tests, and what runs logged."""

import json
from pathlib import Path

from mmbivit.analysis.training_log import read_runs

__all__ = ["CONFIG", "flips_entry", "logged", "train_entry", "write_run"]

CONFIG = "model = dict(type='Some')\ncustom_hooks = [dict(type='mmbivit.DecoupledTrainingHook', {})]\n"


def write_run(work_dir: Path, name: str, entries: list[dict], rest: str = "", config: str = "") -> Path:
    """Write the log of one run, ``rest`` below its entries, and the config beside it; returns the log."""
    file = work_dir / name / "vis_data" / "scalars.json"
    file.parent.mkdir(parents=True)
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries) + rest)
    if config:
        file.with_name("config.py").write_text(config)
    return file


def train_entry(step: int, **values: float) -> dict:
    """What LoggerHook writes of an iteration; ``epoch`` in a run by epochs."""
    return dict(lr=0.1 / step, loss=100.0 / step, time=0.5) | values | dict(iter=step, step=step)


def flips_entry(step: int, **layers: float) -> dict:
    """What SignFlipsHook writes; its total is the mean."""
    shares = {f"sign_flips/{name}": share for name, share in layers.items()}
    return {"sign_flips": sum(layers.values()) / len(layers), **shares, "iter": step, "step": step}


def logged(work_dir: Path, key: str = "step") -> list[dict]:
    """Entries with a key in the logs of all runs in a work dir, in order."""
    return [entry for run in read_runs(work_dir).values() for entry in run if key in entry]
