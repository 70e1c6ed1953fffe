"""Convert a Swin checkpoint: ``python tools/model_converters/swin_to_mmbivit.py SRC DST``."""

import argparse
import sys

from rich.console import Console

import mmbivit.uncaught  # noqa: F401  first: for errors of the imports below
from mmbivit.apis import user_errors
from mmbivit.apis.options import add_debug_option, add_trust_option, trusted
from mmbivit.deploy.conversion import TARGETS, check_destination, convert_checkpoint


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Convert a Swin checkpoint of timm, the official Swin, mmdet or mmbivit, accounting for every key.",
        epilog="Loading needs no conversion: configs and tools take all of these files as they are.",
    )
    parser.add_argument(
        "source", metavar="SRC", help="file, URL, or timm://NAME such as timm://swin_tiny_patch4_window7_224"
    )
    parser.add_argument("destination", metavar="DST", help="file to write")
    parser.add_argument(
        "--to",
        choices=TARGETS,
        default="mmbivit",
        help="mmbivit: for ImageClassifier and detectors (default); timm: a state dict for timm.create_model",
    )
    parser.add_argument(
        "--prefix", help="what the backbone's keys start with (default: 'backbone.' if any key does, else nothing)"
    )
    parser.add_argument(
        "--allow-unplaced", action="store_true", help="leave out keys that a Swin network does not have"
    )
    parser.add_argument("--overwrite", action="store_true", help="write over DST if it exists")
    parser.add_argument("--verbose", action="store_true", help="list every key")
    add_trust_option(parser)
    add_debug_option(parser)
    return parser.parse_args()


def main() -> None:
    """Run the tool."""
    args = parse_args()
    with user_errors(args.debug), trusted(args):
        check_destination(args.destination, args.overwrite)
        conversion = convert_checkpoint(args.source, args.to, args.prefix)
        # Names are not to be broken where nobody looks at a screen.
        Console(width=None if sys.stdout.isatty() else 160).print(conversion.report(args.verbose))
        conversion.save(args.destination, args.overwrite, args.allow_unplaced)
        print(f"Wrote {args.destination} with {args.to}'s names.")


if __name__ == "__main__":
    main()
