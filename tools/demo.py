"""Train a float and a binary detector on digit scenes and compare them: ``make demo``."""

import argparse
import sys
from pathlib import Path

from rich.console import Console

import mmbivit.uncaught  # noqa: F401  first: for errors of the imports below
from mmbivit.apis import user_errors
from mmbivit.apis.options import add_debug_option
from mmbivit.demo import (
    FULL,
    QUICK,
    demo_steps,
    draw_comparison,
    measure_speed,
    predict_scenes,
    report_table,
    run_steps,
)


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train a float and a binary detector on digit scenes; compare them.")
    parser.add_argument("--quick", action="store_true", help="the same path in a few minutes, with no promise of AP")
    parser.add_argument(
        "--out", metavar="DIR", type=Path, help="where everything goes (default: work_dirs/demo, or demo_quick)"
    )
    add_debug_option(parser)
    return parser.parse_args()


def main() -> None:
    """Run the tool."""
    args = parse_args()
    plan = QUICK if args.quick else FULL
    out = args.out or Path("work_dirs") / ("demo_quick" if args.quick else "demo")
    console = Console()
    with user_errors(args.debug):
        try:
            seconds = run_steps(demo_steps(plan, out, Path(__file__).parent), out, plan, console)
        except KeyboardInterrupt:
            sys.exit("\nInterrupted. Run the same command again to go on from here.")
        figure = draw_comparison(out / "data", predict_scenes(plan, out, count=7))
        figure.savefig(out / "detections.png")
        table = report_table(plan, out, seconds, measure_speed(plan, out))
        console.print(table)
        with open(out / "table.txt", "w") as file:
            Console(file=file, width=100).print(table)
        console.print(
            f"data                {out}/data\n"
            f"weights, logs       {out}/float, {out}/sibivit, {out}/logs\n"
            f"packed detector     {out}/sibivit.safetensors\n"
            f"pictures            {out}/detections.png, {out}/predictions/*/vis\n"
            f"this table          {out}/table.txt",
            highlight=False,
        )


if __name__ == "__main__":
    main()
