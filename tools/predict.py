"""Use a detector or a classifier on image files: ``python tools/predict.py CONFIG CHECKPOINT IMAGES...``."""

import argparse

import mmbivit.uncaught  # noqa: F401  first: for errors of the imports below
from mmbivit.apis import UnusableImagesError, predict, print_predictions, user_errors
from mmbivit.apis.options import add_debug_option, add_prediction_options, add_trust_option, trusted


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Detect objects in images, or classify them. A detector writes pictures and JSON; a classifier "
        "prints a table of the most likely classes."
    )
    parser.add_argument("config", help="config file")
    parser.add_argument("checkpoint", help="file or URL of the weights; timm://NAME for a float classifier")
    add_prediction_options(parser)
    parser.add_argument("--device", help="such as cpu or cuda:0 (default: the best available)")
    add_trust_option(parser)
    add_debug_option(parser)
    return parser.parse_args()


def main() -> None:
    """Run the tool."""
    args = parse_args()
    options = dict(score_thr=args.score_thr, topk=args.topk, device=args.device)
    options |= dict(batch_size=args.batch_size, max_pixels=args.max_pixels)
    with user_errors(args.debug), trusted(args):
        try:
            print_predictions(predict(args.config, args.checkpoint, args.images, args.out_dir, **options), args.out_dir)
        except UnusableImagesError as error:
            print_predictions(error.results, args.out_dir)
            raise


if __name__ == "__main__":
    main()
