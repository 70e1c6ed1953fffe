"""Try a packed detector in a browser: ``python tools/serve.py FILE``."""

import argparse

import mmbivit.uncaught  # noqa: F401  first: for errors of the imports below
from mmbivit.apis import user_errors
from mmbivit.apis.images import MAX_PIXELS
from mmbivit.apis.options import add_debug_option, add_trust_option, trusted
from mmbivit.serve import serve
from mmbivit.serve.server import HOST, MAX_BYTES, PORT


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Serve a page to try a detector: drop a picture, and see what float, binary and packed detectors "
        "find in it, side by side, with milliseconds and megabytes. All run on the CPU."
    )
    parser.add_argument("file", metavar="FILE", help="packed detector, as tools/deployment/export_packed.py writes it")
    pair = dict(nargs=2, metavar=("CONFIG", "CHECKPOINT"))
    parser.add_argument("--float", **pair, help="the float detector, for a column of its own")
    parser.add_argument("--binary", **pair, help="the detector whose bits are simulated, for a column of its own")
    parser.add_argument(
        "--host",
        default=HOST,
        help="where to listen; 0.0.0.0 lets others in, with no password (default: %(default)s)",
    )
    parser.add_argument("--port", type=int, default=PORT, help="0 for any that is free (default: %(default)s)")
    parser.add_argument(
        "--max-bytes", type=int, metavar="N", default=MAX_BYTES, help="refuse longer uploads (default: %(default)s)"
    )
    parser.add_argument(
        "--max-pixels",
        type=int,
        metavar="N",
        default=MAX_PIXELS,
        help="refuse pictures of more pixels without decoding them (default: %(default)s)",
    )
    add_trust_option(parser)
    add_debug_option(parser)
    return parser.parse_args()


def main() -> None:
    """Run the tool."""
    args = parse_args()
    with user_errors(args.debug), trusted(args):
        serve(
            args.file,
            float_detector=args.float,
            binary_detector=args.binary,
            host=args.host,
            port=args.port,
            max_bytes=args.max_bytes,
            max_pixels=args.max_pixels,
        )


if __name__ == "__main__":
    main()
