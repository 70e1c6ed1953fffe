"""Do spatial interaction and the two stages help a classifier? Four arms, three seeds, as a table and a plot."""

import argparse
import time
from pathlib import Path

import mmbivit.uncaught  # noqa: F401  first: for errors of the imports below
from mmbivit.apis import user_errors
from mmbivit.apis.options import add_debug_option
from mmbivit.datasets import make_digit_folders
from mmbivit_benchmarks.digits import draw_curves, markdown_table, run_arms


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Train float, binary and two-stage classifiers on cluttered digits; finished runs are not repeated."
    )
    parser.add_argument("--out", type=Path, default=Path("work_dirs/digits"), help="where data, runs and results go")
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each (default: 2)")
    add_debug_option(parser)
    return parser.parse_args()


def main() -> None:
    """Run the tool."""
    args = parse_args()
    with user_errors(args.debug):
        start = time.monotonic()
        data = make_digit_folders(args.out / "data")
        train_tool = Path(__file__).resolve().parents[1] / "train.py"
        results = run_arms(args.seeds, args.out, train_tool, data.root, args.jobs)
        table = markdown_table(results)
        (args.out / "results.md").write_text(table + "\n")
        draw_curves(results).savefig(args.out / "accuracy.png", dpi=120)
        print(table)
        minutes = (time.monotonic() - start) / 60
        print(f"\n{minutes:.1f} minutes. Table and plot: {args.out / 'results.md'}, {args.out / 'accuracy.png'}")


if __name__ == "__main__":
    main()
