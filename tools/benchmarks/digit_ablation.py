"""Do spatial interaction and the two stages help? Arms and seeds on digit scenes, as a Markdown table."""

import argparse
from pathlib import Path

import mmbivit.uncaught  # noqa: F401  first: for errors of the imports below
from mmbivit.apis import user_errors
from mmbivit.apis.options import add_debug_option
from mmbivit_benchmarks.ablation import ARMS, markdown_table, run_arms


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Train the arms of the digit ablation with several seeds; finished runs are not repeated."
    )
    parser.add_argument("--demo", type=Path, default=Path("work_dirs/demo"), help="folder of a finished `make demo`")
    parser.add_argument("--out", type=Path, default=Path("work_dirs/ablation"), help="where the runs go")
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=tuple(ARMS), metavar="ARM")
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    add_debug_option(parser)
    return parser.parse_args()


def main() -> None:
    """Run the tool."""
    args = parse_args()
    with user_errors(args.debug):
        train_tool = Path(__file__).resolve().parents[1] / "train.py"
        teacher = args.demo / "float" / "last.pth"
        results = run_arms(args.arms, args.seeds, args.out, train_tool, args.demo / "data", teacher, args.jobs)
        print(markdown_table(results))


if __name__ == "__main__":
    main()
