"""Evaluate a detector or a classifier: ``python tools/test.py CONFIG CHECKPOINT``."""

import argparse

import mmbivit.uncaught  # noqa: F401  first: for errors of the imports below
from mmbivit.apis import evaluate, evaluation_config, user_errors
from mmbivit.apis.options import add_debug_option, add_run_options, add_trust_option, set_local_rank, trusted


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Evaluate a detector or a classifier on the test data of its config.")
    parser.add_argument(
        "config", help="config file, such as configs/mask_rcnn_sibivit_swin_t.py; classifiers: configs/classification/"
    )
    parser.add_argument(
        "checkpoint",
        help="file or URL of the weights; timm://NAME for a float classifier; a packed detector or classifier, "
        "FILE.safetensors",
    )
    add_run_options(parser)
    parser.add_argument("--out", metavar="FILE.pkl", help="write all predictions to a pickle file")
    add_trust_option(parser)
    add_debug_option(parser)
    detection = parser.add_argument_group("options for detectors")
    detection.add_argument("--show", action="store_true", help="show each image with its detections in a window")
    detection.add_argument(
        "--show-dir",
        metavar="DIR",
        help="write each image with its detections; a relative folder lies below the work dir's <timestamp>",
    )
    detection.add_argument("--wait-time", type=float, default=2.0, help="seconds that each window of --show stays")
    detection.add_argument("--tta", action="store_true", help="average over the image and its mirror image; boxes only")
    return parser.parse_args()


def main() -> None:
    """Run the tool."""
    args = parse_args()
    set_local_rank(args.local_rank)
    with user_errors(args.debug), trusted(args):
        cfg = evaluation_config(
            args.config,
            args.checkpoint,
            work_dir=args.work_dir,
            show=args.show,
            show_dir=args.show_dir,
            wait_time=args.wait_time,
            tta=args.tta,
            cfg_options=args.cfg_options,
            launcher=args.launcher,
            data_root=args.data_root,
        )
        evaluate(cfg, out=args.out)


if __name__ == "__main__":
    main()
