"""What helps: spatial interaction, two stages, gradients without theta? Paired seeds on cluttered digits."""

import argparse
import time
from pathlib import Path

import mmbivit.uncaught  # noqa: F401  first: for errors of the imports below
from mmbivit.apis import user_errors
from mmbivit.apis.options import add_debug_option
from mmbivit.datasets import make_digit_folders
from mmbivit_benchmarks.evidence import QUESTIONS, draw_differences, markdown_tables, run_arms, without_branch


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Train classifiers that differ in one thing, and compare them seed by seed. Finished runs are not "
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
    parser.add_argument("--val-images", type=int, default=5000, help="validation images (default: 5000)")
    add_debug_option(parser)
    return parser.parse_args()


def main() -> None:
    """Run the tool."""
    args = parse_args()
    with user_errors(args.debug):
        start = time.monotonic()
        data = make_digit_folders(args.out / "data", val=args.val_images)
        train_tool = Path(__file__).resolve().parents[1] / "train.py"
        arms = list(dict.fromkeys(arm for q in QUESTIONS if q.key in args.questions for arm in q.arms))
        results = run_arms(arms, args.seeds, args.out, train_tool, data.root, args.jobs)
        branches = [arm for arm in arms if arm == "si_mlp3" or arm.startswith("alpha")]
        runs = {arm: [args.out / f"{arm}_seed{seed}" for seed in args.seeds] for arm in branches}
        branchless = {arm: [without_branch(run, data.root) for run in folders] for arm, folders in runs.items()}
        tables = markdown_tables(results, branchless)
        (args.out / "results.md").write_text(tables + "\n")
        draw_differences(results).savefig(args.out / "differences.png", dpi=120)
        print(f"\n{tables}\n\n{(time.monotonic() - start) / 60:.0f} minutes. Tables and picture: {args.out}")


if __name__ == "__main__":
    main()
