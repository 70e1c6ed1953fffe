"""What does a training step of a binary backbone cost, next to mmdet's float one? Time, kept bytes, peak memory."""

import argparse
import json
import time
from pathlib import Path

from rich.console import Console, Group

import mmbivit.uncaught  # noqa: F401  first: for errors of the imports below
from mmbivit.apis import user_errors
from mmbivit.apis.options import add_debug_option
from mmbivit.files import check_writable
from mmbivit_benchmarks.command_line import print_tables, size
from mmbivit_benchmarks.train_step import PARTS, VARIANTS, make_shares_table, make_step_report, run_step_benchmark

SIZES = [(8, 224, 224), (1, 800, 1344)]


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Time training steps of Swin-T in one process, in turn: mmdet's float one, and ours in both "
        "stages, with bits and with floats kept for the backward pass; alone, and in Mask R-CNN. Compare what they "
        "keep and their peak memory, and say whether the goals are reached. Leave the machine idle meanwhile."
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="(default: both)")
    parser.add_argument(
        "--sizes", type=size, nargs="+", metavar="BxHxW", help="images (default: 8x224x224 and 1x800x1344)"
    )
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="(default: all)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="steps of each that are timed (default: 5)")
    parser.add_argument(
        "--shares", action="store_true", help="say instead where the time of a step goes, by torch's profiler"
    )
    parser.add_argument("--no-memory", action="store_true", help="leave out the peaks, which take a process each")
    parser.add_argument("--threads", type=int, metavar="N", help="on the CPU (default: torch's)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers here")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the tables here, too")
    add_debug_option(parser)
    return parser.parse_args()


def main() -> None:
    """Run the tool."""
    import torch  # not above, where it would come before mmbivit.uncaught

    args = parse_args()
    progress = Console(stderr=True, style="dim", highlight=False)
    start = time.perf_counter()
    with user_errors(args.debug):
        for option, file in (("--json", args.json), ("--out", args.out)):
            if file:
                check_writable(option, file)  # now, not after an hour
                file.parent.mkdir(parents=True, exist_ok=True)
        threads = torch.get_num_threads() if args.threads is None else args.threads
        sizes = args.sizes or SIZES
        if args.shares:
            tables = [make_shares_table(part, shape, args.variants, threads) for shape in sizes for part in args.parts]
            print_tables(Group(*tables), args.out)
            return
        results = [
            run_step_benchmark(
                part,
                shape,
                args.variants,
                args.rounds,
                threads,
                args.device,
                not args.no_memory,
                say=lambda text: progress.print(f"{time.perf_counter() - start:4.0f} s  {text}"),
            )
            for shape in sizes
            for part in args.parts
        ]
        if args.json:
            args.json.write_text(json.dumps(results))
        print_tables(Group(*map(make_step_report, results)), args.out)


if __name__ == "__main__":
    main()
