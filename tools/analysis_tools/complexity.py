"""Count what a network costs: ``python tools/analysis_tools/complexity.py CONFIG``."""

import argparse

from rich.console import Console

import mmbivit.uncaught  # noqa: F401  first: for errors of the imports below
from mmbivit.apis import user_errors
from mmbivit.apis.options import add_debug_option
from mmbivit.files import check_writable
from mmbivit.report.complexity import (
    check_format,
    complexity_table,
    config_complexity,
    layer_records,
    total_records,
    write_complexity,
)

SHOWN = ("module", "bits", "calls", "FLOPs", "BOPs", "parameters", "bytes")  # as a terminal is narrow


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Count the operations, parameters and bytes of a config's network, beside those of the same in "
        "float. Needs neither weights nor data."
    )
    parser.add_argument("config", help="config file of a detector or classifier")
    parser.add_argument(
        "--shape",
        nargs=2,
        type=int,
        metavar=("H", "W"),
        help="height and width of the image in pixels as the network gets it, so with padding (default: the config's "
        "test images, 224 224 where that is not clear)",
    )
    parser.add_argument("--per-layer", action="store_true", help="also list each module; --out has more of it")
    parser.add_argument(
        "--out", metavar="FILE", help="also write a web page (.html), Markdown (.md) or exact numbers (.csv)"
    )
    add_debug_option(parser)
    return parser.parse_args()


def main() -> None:
    """Count, print and write."""
    args = parse_args()
    with user_errors(args.debug):
        if args.out:
            check_format(args.out)
            check_writable("--out", args.out)
        with Console(stderr=True).status("Counting"):
            report = config_complexity(args.config, args.shape)
        console = Console()
        if args.per_layer:
            layers = [{key: record[key] for key in SHOWN} for record in layer_records(report.network)]
            console.print(complexity_table(layers, args.config))
        console.print(complexity_table(total_records(report), args.config, report.caption))
        if args.out:
            write_complexity(report, args.out, args.per_layer)


if __name__ == "__main__":
    main()
