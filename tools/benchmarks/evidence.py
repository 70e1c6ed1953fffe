"""What helps: spatial interaction, two stages, gradients without theta? Paired seeds on digits."""

import argparse
import time
from pathlib import Path

import mmbivit.uncaught  # noqa: F401  first: for errors of the imports below
from mmbivit.apis import user_errors
from mmbivit.apis.options import add_debug_option
from mmbivit.datasets import make_digit_folders, make_digit_scenes
from mmbivit_benchmarks.evidence import (
    ARMS,
    CLASSIFICATION,
    DETECTION,
    QUESTIONS,
    all_differences,
    draw_differences,
    markdown_tables,
    run_arms,
    without_branch,
)


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Train networks that differ in one thing, and compare them seed by seed. Finished runs are not "
        "repeated: the same command goes on where it was stopped."
    )
    parser.add_argument("--out", type=Path, default=Path("work_dirs/evidence"), help="where data, runs and results go")
    parser.add_argument("--seeds", nargs="+", type=int, default=tuple(range(6)))
    keys = [question.key for question in QUESTIONS]
    titles = ", ".join(f"{question.key}: {question.title}" for question in QUESTIONS)
    parser.add_argument(
        "--questions", nargs="+", choices=keys, default=keys[:2], help=f"{titles} (default: {' '.join(keys[:2])})"
    )
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each (default: 2)")
    parser.add_argument("--val-images", type=int, default=5000, help="of classification (default: 5000)")
    parser.add_argument("--val-scenes", type=int, default=500, help="of detection (default: 500)")
    add_debug_option(parser)
    return parser.parse_args()


def main() -> None:
    """Run the tool."""
    args = parse_args()
    with user_errors(args.debug):
        start = time.monotonic()
        arms = {arm: ARMS[arm] for q in QUESTIONS if q.key in args.questions for arm in q.arms}
        tasks = {arm.task for arm in arms.values()}
        if tasks - {DETECTION}:
            make_digit_folders(args.out / CLASSIFICATION.data, val=args.val_images)
        if DETECTION in tasks:
            make_digit_scenes(args.out / DETECTION.data, train=1000, val=args.val_scenes)
        train_tool = Path(__file__).resolve().parents[1] / "train.py"
        results = run_arms(arms, args.seeds, args.out, train_tool, args.jobs)
        branches = [arm for arm in arms if arm == "si_mlp3" or arm.startswith("alpha")]
        runs = {arm: [args.out / f"{arm}_seed{seed}" for seed in args.seeds] for arm in branches}
        data = args.out / CLASSIFICATION.data
        branchless = {arm: [without_branch(run, data) for run in folders] for arm, folders in runs.items()}
        tables = markdown_tables(results, branchless)
        (args.out / "results.md").write_text(tables + "\n")
        draw_differences(all_differences(results)).savefig(args.out / "differences.png", dpi=120)
        print(f"\n{tables}\n\n{(time.monotonic() - start) / 60:.0f} minutes. Tables and picture: {args.out}")


if __name__ == "__main__":
    main()
