"""Use a packed network on image files: ``python tools/deployment/predict_packed.py FILE IMAGES...``."""

import argparse
import os

import mmbivit.uncaught  # noqa: F401  first: for errors of the imports below
from mmbivit.apis import UnusableImagesError, predict, print_predictions, user_errors
from mmbivit.apis.options import add_debug_option, add_prediction_options


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Detect objects in images, or classify them, with a packed file on the CPU. A detector writes "
        "pictures and JSON; a classifier prints a table of the most likely classes."
    )
    parser.add_argument("file", help="packed file, as tools/deployment/export_packed.py writes it")
    add_prediction_options(parser)
    parser.add_argument(
        "--launcher",
        choices=("none", "pytorch"),
        default="none",
        help="who starts the processes: pytorch for torchrun, of which each takes a share of the images",
    )
    add_debug_option(parser)
    return parser.parse_args()


def main() -> None:
    """Run the tool."""
    args = parse_args()
    options = dict(score_thr=args.score_thr, topk=args.topk, batch_size=args.batch_size, max_pixels=args.max_pixels)
    with user_errors(args.debug):
        try:
            results = predict(None, args.file, args.images, args.out_dir, launcher=args.launcher, **options)
        except UnusableImagesError as error:
            if is_first(args):
                print_predictions(error.results, args.out_dir)
                raise
        else:
            if is_first(args):
                print_predictions(results, args.out_dir)


def is_first(args: argparse.Namespace) -> bool:
    """Whether this is the process that prints; all of them know all results."""
    return args.launcher == "none" or os.environ["RANK"] == "0"


if __name__ == "__main__":
    main()
