"""Write one page on a training run: ``python tools/analysis_tools/report.py WORK_DIR``."""

import argparse

import mmbivit.uncaught  # noqa: F401  first: for errors of the imports below
from mmbivit.apis import user_errors
from mmbivit.apis.options import add_debug_option, add_trust_option, trusted
from mmbivit.report import write_report


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Write one HTML page on a training run, with all pictures inside: curves, accuracy of each class, "
        "size and operations, what the binary network does, examples, environment and config."
    )
    parser.add_argument("work_dir", metavar="WORK_DIR", help="work dir of tools/train.py")
    parser.add_argument("--out", metavar="FILE", help="the page (default: WORK_DIR/report.html)")
    parser.add_argument("--checkpoint", metavar="FILE", help="weights to look at (default: the newest in WORK_DIR)")
    parser.add_argument("--data-root", metavar="DIR", help="folder of the data set, if it has been moved")
    parser.add_argument(
        "--float-checkpoint", metavar="FILE", help="the float network that training started from, if it has been moved"
    )
    parser.add_argument(
        "--images", metavar="N", type=int, default=4, help="example images, 1 to 8 (default: %(default)s)"
    )
    parser.add_argument("--no-eval", action="store_true", help="do not evaluate on the test data, which can take long")
    add_trust_option(parser)
    add_debug_option(parser)
    return parser.parse_args()


def main() -> None:
    """Run the tool."""
    args = parse_args()
    with user_errors(args.debug), trusted(args):
        out = write_report(
            args.work_dir,
            args.out,
            checkpoint=args.checkpoint,
            data_root=args.data_root,
            float_checkpoint=args.float_checkpoint,
            num_images=args.images,
            evaluate=not args.no_eval,
        )
        print(f"Wrote {out}, {out.stat().st_size / 1e6:.1f} MB.")


if __name__ == "__main__":
    main()
