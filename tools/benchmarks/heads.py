"""What binary necks and heads cost in AP, part by part: paired seeds on digit scenes."""

import argparse
import time
from pathlib import Path

import mmbivit.uncaught  # noqa: F401  first: for errors of the imports below
from mmbivit.apis import user_errors
from mmbivit.apis.options import add_debug_option
from mmbivit.datasets import make_digit_scenes
from mmbivit_benchmarks.evidence import DETECTION, draw_differences, run_arms
from mmbivit_benchmarks.heads import ARMS, PARTS, REFERENCE, coco_cost, differences, markdown_table, read_scores


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Train detectors whose neck and heads are binary part by part, from the same float detector and "
        "for as long. Finished runs are not repeated: the same command goes on where it was stopped."
    )
    parser.add_argument("--out", type=Path, default=Path("work_dirs/heads"), help="where data, runs and results go")
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2), help="two or more (default: 0 1 2)")
    default = (*PARTS, "all")
    parser.add_argument(
        "--arms", nargs="+", choices=ARMS, default=default, help=f"beside {REFERENCE} (default: {' '.join(default)})"
    )
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each (default: 2)")
    parser.add_argument("--val-scenes", type=int, default=500, help="(default: 500)")
    add_debug_option(parser)
    return parser.parse_args()


def main() -> None:
    """Run the tool."""
    args = parse_args()
    with user_errors(args.debug):
        start = time.monotonic()
        make_digit_scenes(args.out / DETECTION.data, train=1000, val=args.val_scenes)
        names = dict.fromkeys((REFERENCE, *args.arms))
        arms = {name: ARMS[name] for name in ARMS if name in names}
        train_tool = Path(__file__).resolve().parents[1] / "train.py"
        run_arms(arms, args.seeds, args.out, train_tool, args.jobs)
        scores = read_scores(args.out, tuple(arms), args.seeds)
        table = markdown_table(scores, {name: coco_cost(arm) for name, arm in arms.items()})
        (args.out / "heads.md").write_text(table + "\n")
        draw_differences(differences(scores)).savefig(args.out / "heads.png", dpi=120)
        print(f"\n{table}\n\n{(time.monotonic() - start) / 60:.0f} minutes. Table and picture: {args.out}")


if __name__ == "__main__":
    main()
