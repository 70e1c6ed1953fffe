"""Detect objects in images: ``python tools/predict.py CONFIG CHECKPOINT IMAGES... --out-dir DIR``."""

import argparse

from mmbivit.apis import predict, user_errors
from mmbivit.apis.options import add_debug_option


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Detect objects in images; writes pictures and JSON.")
    parser.add_argument("config", help="config file")
    parser.add_argument("checkpoint", help="file or URL of the weights")
    parser.add_argument("images", nargs="+", metavar="IMAGES", help="image files, folders of images, glob patterns")
    parser.add_argument(
        "--out-dir", required=True, metavar="DIR", help="pictures go to DIR/vis, detections as JSON to DIR/preds"
    )
    parser.add_argument("--score-thr", type=float, default=0.3, help="lowest score that is drawn (default: 0.3)")
    parser.add_argument("--device", help="such as cpu or cuda:0 (default: the best available)")
    parser.add_argument("--batch-size", type=int, default=1, help="images per forward pass (default: 1)")
    add_debug_option(parser)
    return parser.parse_args()


def main() -> None:
    """Run the tool."""
    args = parse_args()
    with user_errors(args.debug):
        files = predict(
            args.config,
            args.checkpoint,
            args.images,
            args.out_dir,
            score_thr=args.score_thr,
            device=args.device,
            batch_size=args.batch_size,
        )
        print(f"Wrote {len(files)} pictures to {args.out_dir}/vis and their detections to {args.out_dir}/preds.")


if __name__ == "__main__":
    main()
