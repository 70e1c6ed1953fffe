"""How fast and how small is packed inference, next to float runtimes? Tables, and whether the goals are reached."""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType

import mmbivit.uncaught  # noqa: F401  first: for errors of the imports below
from mmbivit.apis import user_errors
from mmbivit.apis.options import add_debug_option
from mmbivit.files import check_writable
from mmbivit_benchmarks.command_line import print_tables, size
from mmbivit_benchmarks.packed import (
    DETECTION,
    NETWORKS,
    RUNTIMES,
    make_detector_report,
    make_report,
    run_benchmark,
    run_detector_benchmark,
)

SIZES = [(1, 224, 224), (8, 224, 224), DETECTION]


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Time a backbone in one process, the runtimes in turn: float in torch, torch.compile, "
        "ONNX Runtime and OpenVINO, 8-bit integers, simulated binary and packed. Compare files and peak memory, time "
        "the matrix products, say where the packed time goes, and whether the goals are reached. Runtimes that are "
        "missing are left out: pip install 'mmbivit[benchmark]' brings them. Leave the machine idle meanwhile."
    )
    parser.add_argument(
        "--quick", action="store_true", help="a minute or two: 224 x 224 only, few repeats, no torch.compile, no memory"
    )
    parser.add_argument(
        "--network",
        choices=NETWORKS,
        default="swin_t",
        help="the Swin-T of detectors (default), or the DeiT-S of classifiers",
    )
    parser.add_argument(
        "--detector",
        action="store_true",
        help="a whole Mask R-CNN Swin-T instead, part by part: float, packed backbone, packed whole (10 minutes)",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="threads of every runtime (default: torch's)")
    parser.add_argument(
        "--repeats",
        type=int,
        metavar="N",
        help="visits to each runtime at 1x224x224; larger sizes get fewer (default: 20)",
    )
    parser.add_argument(
        "--sizes", type=size, nargs="+", metavar="BxHxW", help="images (default: 1x224x224 8x224x224 1x800x1344)"
    )
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, metavar="NAME", help=f"of {', '.join(RUNTIMES)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers here")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the tables here, too")
    add_debug_option(parser)
    return parser.parse_args()


def main() -> None:
    """Run the tool."""
    import torch  # not above, where it would come before mmbivit.uncaught

    args = parse_args()
    swin = args.network == "swin_t"
    sizes = args.sizes or (SIZES[:1] if args.quick else [size for size in SIZES if size != DETECTION or swin])
    quick_runtimes = [name for name in RUNTIMES if name != "compile"]
    left_out = {"compile": "left out by --quick: it compiles for a minute"} if args.quick and not args.runtimes else {}
    progress = Console(stderr=True, style="dim", highlight=False)
    start = time.perf_counter()
    with user_errors(args.debug):
        for option, file in (("--json", args.json), ("--out", args.out)):
            if file:
                check_writable(option, file)  # now, not after ten minutes
                file.parent.mkdir(parents=True, exist_ok=True)
        threads = torch.get_num_threads() if args.threads is None else args.threads
        repeats = (5 if args.quick else 20) if args.repeats is None else args.repeats

        def say(text: str) -> None:
            progress.print(f"{time.perf_counter() - start:4.0f} s  {text}")

        if args.detector:
            shape = DETECTION if args.sizes is None else args.sizes[0]
            results = run_detector_benchmark(shape, max(1, repeats // 2), threads, say=say)
            write(results, make_detector_report(results), args)
            return
        results = run_benchmark(
            sizes,
            args.runtimes or (quick_runtimes if args.quick else list(RUNTIMES)),
            repeats,
            threads,
            memory_shape=None if args.quick or DETECTION not in sizes else DETECTION,
            network=args.network,
            left_out=left_out,
            say=say,
        )
        write(results, make_report(results), args)


def write(results: dict[str, Any], tables: RenderableType, args: argparse.Namespace) -> None:
    """Print the tables, and write what the options ask for."""
    if args.json:
        args.json.write_text(json.dumps(results))
    print_tables(tables, args.out)


if __name__ == "__main__":
    main()
