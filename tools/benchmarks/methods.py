"""What spatial interaction adds to each binarization method: a small version of SI-BiViT's Table 9, on digits."""

import argparse
import time
from pathlib import Path

import mmbivit.uncaught  # noqa: F401  first: for errors of the imports below
from mmbivit.apis import user_errors
from mmbivit.apis.options import add_debug_option
from mmbivit.datasets import make_digit_folders
from mmbivit_benchmarks.evidence import CLASSIFICATION, draw_differences, run_arms
from mmbivit_benchmarks.methods import METHODS, differences, markdown_table, method_arms


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Train every method's recipe with and without spatial interaction, from the same float network and "
        "for as long. Finished runs are not repeated: the same command goes on where it was stopped. Data and float "
        "networks are those of evidence.py, if --out is the same."
    )
    parser.add_argument("--out", type=Path, default=Path("work_dirs/evidence"), help="where data, runs and results go")
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2), help="two or more (default: 0 1 2)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="recipes (default: all)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each (default: 2)")
    parser.add_argument("--val-images", type=int, default=5000, help="(default: 5000)")
    add_debug_option(parser)
    return parser.parse_args()


def main() -> None:
    """Run the tool."""
    args = parse_args()
    with user_errors(args.debug):
        start = time.monotonic()
        make_digit_folders(args.out / CLASSIFICATION.data, val=args.val_images)
        train_tool = Path(__file__).resolve().parents[1] / "train.py"
        results = run_arms(method_arms(tuple(args.methods)), args.seeds, args.out, train_tool, args.jobs)
        table = markdown_table(results)
        (args.out / "methods.md").write_text(table + "\n")
        figure = draw_differences({"What spatial interaction adds to each method": differences(results)})
        figure.savefig(args.out / "methods.png", dpi=120)
        print(f"\n{table}\n\n{(time.monotonic() - start) / 60:.0f} minutes. Table and picture: {args.out}")


if __name__ == "__main__":
    main()
