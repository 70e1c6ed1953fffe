"""Runs the arms of the digit ablation with several seeds and tabulates them."""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mmbivit import config_path

__all__ = ["ARMS", "METRICS", "markdown_table", "run_arms"]

ARMS = {
    "two stages, SI, MLP 3": "digits/mask_rcnn_sibivit",
    "two stages, no SI, MLP 3": "digits/ablation/two_stage_no_si_mlp3",
    "two stages, no SI, MLP 4": "digits/ablation/two_stage_no_si_mlp4",
    "single stage, SI, MLP 3": "digits/ablation/single_stage_si",
}
METRICS = ("bbox_mAP", "bbox_mAP_50", "segm_mAP", "segm_mAP_50")


def run_arms(
    arms: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    train_tool: Path,
    data: Path,
    float_checkpoint: Path,
    jobs: int,
) -> dict[str, list[dict[str, float]]]:
    """Train every arm with every seed, unless that is done already, and return the metrics of each run.

    Args:
        arms: names of :data:`ARMS`.
        seeds: seeds of initialisation and sampling; all runs start from the same float detector.
        out: a folder per run, named ``<config>_seed<n>``.
        train_tool: path of ``tools/train.py``.
        data: folder of the digit scenes.
        float_checkpoint: the float detector, teacher and start of every run.
        jobs: runs at a time, one thread each.

    Raises:
        RuntimeError: if a run fails; it names the log.
    """

    def run(job: tuple[str, int]) -> dict[str, float]:
        arm, seed = job
        config = config_path(ARMS[arm])
        work_dir = out / f"{config.stem}_seed{seed}"
        if (metrics := read_last_metrics(work_dir)) is None:
            work_dir.mkdir(parents=True, exist_ok=True)
            options = ["--work-dir", work_dir, "--data-root", data, "--float-checkpoint", float_checkpoint]
            options += ["--seed", seed, "--cfg-options", "train_cfg.val_interval=600"]
            line = [str(word) for word in (sys.executable, train_tool, config, *options)]
            with open(work_dir / "log.txt", "w") as log:
                environment = os.environ | {"OMP_NUM_THREADS": "1"}
                subprocess.run(line, stdout=log, stderr=subprocess.STDOUT, env=environment, check=False)
            metrics = read_last_metrics(work_dir)
        if metrics is None:
            raise RuntimeError(f"{arm}, seed {seed} wrote no metrics; its log is {work_dir / 'log.txt'}")
        return metrics

    work = [(arm, seed) for seed in seeds for arm in arms]
    with ThreadPoolExecutor(jobs) as pool:
        results = list(pool.map(run, work))
    return {arm: [result for job, result in zip(work, results, strict=True) if job[0] == arm] for arm in arms}


def read_last_metrics(work_dir: Path) -> dict[str, float] | None:
    """Read the last COCO metrics that a training logged, or ``None`` if there are none."""
    for file in sorted(work_dir.glob("*/vis_data/scalars.json"), reverse=True):
        for line in reversed(file.read_text().splitlines()):
            row = json.loads(line)
            if "coco/bbox_mAP" in row:
                return {name: row[f"coco/{name}"] for name in METRICS}
    return None


def markdown_table(results: dict[str, list[dict[str, float]]]) -> str:
    """Format mean and sample standard deviation over seeds, and each seed's box AP50, as Markdown."""
    lines = ["| arm | box AP | box AP50 | mask AP | mask AP50 | box AP50 of each seed |", "|---|---|---|---|---|---|"]
    for arm, runs in results.items():
        cells = []
        for name in METRICS:
            values = [run[name] for run in runs]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}")
        each = ", ".join(f"{run['bbox_mAP_50']:.3f}" for run in runs)
        lines.append(f"| {arm} | {' | '.join(cells)} | {each} |")
    return "\n".join(lines)
