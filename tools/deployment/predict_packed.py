"""Use a packed network on image files: ``python tools/deployment/predict_packed.py FILE IMAGES...``."""

import argparse
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

import mmbivit.uncaught  # noqa: F401  first: for errors of the imports below
from mmbivit.apis import (
    UnusableImagesError,
    classify_packed,
    detect_packed,
    packed_kind,
    predictions_table,
    user_errors,
)
from mmbivit.apis.options import add_debug_option, add_pixels_option


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Detect objects in images, or classify them, with a packed file on the CPU. A detector writes "
        "pictures and JSON; a classifier prints a table of the most likely classes."
    )
    parser.add_argument("file", help="packed file, as tools/deployment/export_packed.py writes it")
    parser.add_argument("images", nargs="+", metavar="IMAGES", help="image files, folders of images, glob patterns")
    parser.add_argument(
        "--out-dir",
        metavar="DIR",
        help="a detector's pictures go to DIR/vis and its detections as JSON to DIR/preds (needed); "
        "a classifier's classes go as JSON to DIR/preds (default: only printed)",
    )
    parser.add_argument(
        "--score-thr", type=float, metavar="SCORE", help="detectors only: lowest score that is drawn (default: 0.3)"
    )
    parser.add_argument("--topk", type=int, metavar="N", help="classifiers only: classes per image (default: 5)")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="images per forward pass (default: 1)")
    add_pixels_option(parser)
    add_debug_option(parser)
    return parser.parse_args()


def main() -> None:
    """Run the tool."""
    args = parse_args()
    with user_errors(args.debug):
        kind = packed_kind(args.file, detector_score_thr=args.score_thr, classifier_topk=args.topk)
        run, show = (run_classifier, show_classes) if kind == "classifier" else (run_detector, show_detections)
        try:
            show(run(args), args)
        except UnusableImagesError as error:
            show(error.results, args)
            raise


def run_detector(args: argparse.Namespace) -> list[Path]:
    """Write pictures and detections."""
    options = {} if args.score_thr is None else dict(score_thr=args.score_thr)
    options.update(batch_size=args.batch_size, max_pixels=args.max_pixels)
    return detect_packed(args.file, args.images, args.out_dir, **options)


def show_detections(files: list[Path], args: argparse.Namespace) -> None:
    """Say where the pictures and detections are."""
    print(f"Wrote {len(files)} pictures to {args.out_dir}/vis and their detections to {args.out_dir}/preds.")


def run_classifier(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Find the most likely classes, and write them where that is wanted."""
    options = {} if args.topk is None else dict(topk=args.topk)
    options.update(batch_size=args.batch_size, max_pixels=args.max_pixels)
    return classify_packed(args.file, args.images, args.out_dir, **options)


def show_classes(results: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Print the most likely classes."""
    # A pipe or a file has no width: nothing is cut there.
    Console(width=None if sys.stdout.isatty() else 10_000).print(predictions_table(results))
    if args.out_dir is not None:
        print(f"Wrote the classes of {len(results)} images to {args.out_dir}/preds.")


if __name__ == "__main__":
    main()
