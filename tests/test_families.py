"""The tools one after the other, as `make test-openmmlab` calls them with OpenMMLab's own packages too."""

import json
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mmbivit.checkpoints import load_checkpoint_file

ROOT = Path(__file__).parents[1]
ITERATIONS = 12  # six passes through four images, two in each batch

# Counted in iterations, from an endless sampler, by a worker that stays: a worker may take batches too early.
BY_ITERATIONS = f"""
train_cfg = dict(_delete_=True, type="IterBasedTrainLoop", max_iters={ITERATIONS}, val_interval={ITERATIONS})
train_dataloader = dict(num_workers=1, persistent_workers=True, sampler=dict(_delete_=True, type="InfiniteSampler"))
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=1, max_keep_ckpts=2))
log_processor = dict(by_epoch=False)
"""


def start(tool: str, *arguments: object) -> subprocess.Popen:
    """Start a tool in another process, whose output goes to this one's."""
    command = [sys.executable, str(ROOT / "tools" / tool), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)


def call(tool: str, *arguments: object) -> str:
    """Run a tool in another process, and return what it prints."""
    process = start(tool, *arguments)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out[-3000:]
    return out


def kill_at(iteration: int, work_dir: Path, *arguments: object) -> None:
    """Train until the checkpoint of an iteration, or of a later one, is there, and kill the process."""
    process = start("train.py", *arguments, "--work-dir", work_dir)
    pointer = work_dir / "last_checkpoint"
    while process.poll() is None:
        found = re.search(r"\d+", pointer.read_text()) if pointer.is_file() else None
        if found and int(found[0]) >= iteration:
            process.kill()
            break
        time.sleep(0.01)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, out[-3000:]


@pytest.fixture(scope="module")
def config(configs: dict[str, Path]) -> Path:
    """A detector in two stages, by iterations."""
    path = configs["binary"].with_name("by_iterations.py")
    text = configs["binary"].read_text()
    assert "switch_epoch=1" in text
    path.write_text(text.replace("switch_epoch=1", "switch_iter=6") + BY_ITERATIONS)
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, config: Path, float_checkpoint: Path) -> Path:
    """The work dir of a run without interruption."""
    work_dir = tmp_path_factory.mktemp("whole")
    call("train.py", config, "--work-dir", work_dir, "--seed", 0, "--float-checkpoint", float_checkpoint)
    return work_dir


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="kills by signals")
def test_killed_in_both_stages_it_ends_in_the_same_weights(whole, config, float_checkpoint, tmp_path):
    options = [config, "--seed", 0, "--float-checkpoint", float_checkpoint]
    kill_at(2, tmp_path, *options)
    kill_at(7, tmp_path, *options, "--resume")
    call("train.py", *options, "--resume", "--work-dir", tmp_path)

    a, b = (load_checkpoint_file(str(folder / f"iter_{ITERATIONS}.pth")) for folder in (whole, tmp_path))
    assert int(a["state_dict"]["backbone.training_stage"]) == 2
    assert a["state_dict"].keys() == b["state_dict"].keys()
    assert [name for name, value in a["state_dict"].items() if not torch.equal(value, b["state_dict"][name])] == []
    moments = [[entry["exp_avg"] for entry in run["optimizer"]["state"].values()] for run in (a, b)]
    assert moments[0] and all(torch.equal(x, y) for x, y in zip(*moments, strict=True))


def average_precision(log: str) -> float:
    return float(re.findall(r"coco/bbox_mAP: ([\d.-]+)", log)[-1])


@pytest.mark.slow
def test_a_trained_detector_is_evaluated_packed_and_predicts(whole, config, coco, tmp_path, monkeypatch):
    def run(tool: str, *arguments: object) -> None:
        """Run a tool in this process: another would spend most of its time on imports."""
        monkeypatch.setattr(sys, "argv", [tool, *map(str, arguments)])
        runpy.run_path(str(ROOT / "tools" / tool), run_name="__main__")

    def evaluated(file: Path, name: str) -> float:
        options = ["--work-dir", tmp_path / name, "--cfg-options", f"experiment_name={tmp_path.name}_{name}"]
        run("test.py", config, file, *options)
        (log,) = (tmp_path / name).glob("*/*.log")
        return average_precision(log.read_text())

    weights, packed = whole / f"iter_{ITERATIONS}.pth", tmp_path / "packed.safetensors"
    (log,) = whole.glob("*/*.log")
    precision = evaluated(weights, "tested")
    assert precision == average_precision(log.read_text())

    run("deployment/export_packed.py", config, weights, packed)
    assert packed.stat().st_size < weights.stat().st_size
    assert evaluated(packed, "tested_packed") == pytest.approx(precision, abs=0.1)

    (image, *_) = sorted((coco / "val2017").iterdir())
    run("predict.py", config, weights, image, "--out-dir", tmp_path / "simulated")
    run("deployment/predict_packed.py", packed, image, "--out-dir", tmp_path / "packed")
    found = [
        json.loads((tmp_path / name / "preds" / f"{image.stem}.json").read_text()) for name in ("simulated", "packed")
    ]
    assert len(found[0]["scores"]) == len(found[1]["scores"]) == 5
    assert found[0]["scores"] == pytest.approx(found[1]["scores"], abs=0.05)
