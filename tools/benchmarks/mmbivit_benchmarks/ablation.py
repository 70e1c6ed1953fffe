"""Runs the arms of the digit ablation with several seeds and tabulates them."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .repeated_runs import check_runs, mean_and_deviation, train_once

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
        ValueError: for an impossible seed, or less than one job.
    """
    check_runs(seeds, jobs)

    def run(job: tuple[str, int]) -> dict[str, float]:
        arm, seed = job
        work_dir = out / f"{Path(ARMS[arm]).name}_seed{seed}"
        options = ["--data-root", data, "--float-checkpoint", float_checkpoint, "--seed", seed]
        options += ["--cfg-options", "train_cfg.val_interval=600"]
        last = train_once(train_tool, ARMS[arm], work_dir, options, "coco/bbox_mAP")[-1]
        return {name: last[f"coco/{name}"] for name in METRICS}

    work = [(arm, seed) for seed in seeds for arm in arms]
    with ThreadPoolExecutor(jobs) as pool:
        results = list(pool.map(run, work))
    return {arm: [result for job, result in zip(work, results, strict=True) if job[0] == arm] for arm in arms}


def markdown_table(results: dict[str, list[dict[str, float]]]) -> str:
    """Format mean and sample standard deviation over seeds, and each seed's box AP50, as Markdown."""
    lines = ["| arm | box AP | box AP50 | mask AP | mask AP50 | box AP50 of each seed |", "|---|---|---|---|---|---|"]
    for arm, runs in results.items():
        cells = []
        for name in METRICS:
            cells.append(mean_and_deviation([run[name] for run in runs], 3))
        each = ", ".join(f"{run['bbox_mAP_50']:.3f}" for run in runs)
        lines.append(f"| {arm} | {' | '.join(cells)} | {each} |")
    return "\n".join(lines)
