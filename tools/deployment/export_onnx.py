"""Write a trained network as ONNX: ``python tools/deployment/export_onnx.py CONFIG CHECKPOINT OUT --size H W``."""

import argparse
from pathlib import Path

import mmbivit.uncaught  # noqa: F401  first: for errors of the imports below
from mmbivit.apis import export_onnx, user_errors
from mmbivit.apis.options import add_debug_option, add_trust_option, trusted


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Write a classifier, or the backbone of a detector, as an ONNX file of standard operators, and "
        "compare it with torch in ONNX Runtime. It computes in float32; for a network of bits see export_packed.py.",
    )
    parser.add_argument("config", help="config file")
    parser.add_argument("checkpoint", help="file or URL of the weights, of training stage 2")
    parser.add_argument("out", metavar="OUT", help="file to write, ending in .onnx")
    parser.add_argument(
        "--size", nargs=2, type=int, required=True, metavar=("H", "W"), help="size of the images in pixels, fixed"
    )
    parser.add_argument("--batch-size", type=int, metavar="N", help="images per run, fixed (default: any number)")
    parser.add_argument("--no-check", action="store_true", help="do not compare the file with torch")
    add_trust_option(parser)
    add_debug_option(parser)
    return parser.parse_args()


def main() -> None:
    """Run the tool."""
    args = parse_args()
    with user_errors(args.debug), trusted(args):
        options = dict(size=tuple(args.size), batch_size=args.batch_size, check=not args.no_check)
        comparison = export_onnx(args.config, args.checkpoint, args.out, **options)
        if comparison is not None:
            print(f"ONNX Runtime: {comparison}.")
        print(f"Wrote {args.out}, {Path(args.out).stat().st_size / 1e6:.1f} MB.")


if __name__ == "__main__":
    main()
