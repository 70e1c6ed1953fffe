"""Train the demo's detector for an hour, killing it every few minutes, and see what it leaves behind."""

import argparse
import sys
from pathlib import Path

from rich.console import Console

import mmbivit.uncaught  # noqa: F401  first: for errors of the imports below
from mmbivit.apis import user_errors
from mmbivit.apis.options import add_debug_option
from mmbivit_benchmarks.soak import problems, read_attempts, soak, summary_table


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Kill and resume a training run; fail if it leaks or loses work.")
    parser.add_argument("--out", type=Path, default=Path("work_dirs/soak"), help="where data, runs and samples go")
    parser.add_argument("--minutes", type=float, default=60, help="how long (default: 60)")
    parser.add_argument("--kill-minutes", type=float, default=4, help="mean time between kills (default: 4)")
    parser.add_argument("--seed", type=int, default=0, help="of the times between kills")
    parser.add_argument("--report", action="store_true", help="only show what an earlier run in --out has found")
    add_debug_option(parser)
    return parser.parse_args()


def main() -> None:
    """Run the tool."""
    args = parse_args()
    console = Console()
    with user_errors(args.debug):
        tools = Path(__file__).resolve().parents[1]
        if args.report:
            attempts = read_attempts(args.out)
        else:
            attempts = soak(args.out, tools, args.minutes, args.kill_minutes, args.seed, console)
    console.print(summary_table(attempts))
    found = problems(attempts)
    console.print("\n".join(found) if found else "nothing left behind, nothing lost", highlight=False)
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
