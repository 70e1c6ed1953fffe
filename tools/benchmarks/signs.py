"""What signs keep of a float detector's neck and heads: shares of variance, layer by layer, and at the border."""

import argparse
from pathlib import Path

import mmbivit.uncaught  # noqa: F401  first: for errors of the imports below
from mmbivit.apis import load_config, user_errors
from mmbivit.apis.options import add_debug_option
from mmbivit.datasets import set_data_root
from mmbivit_benchmarks.signs import markdown_tables, measure_config


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Run a float detector on a batch of validation images and measure how much of the outputs of its "
        "large layers the signs of their inputs and weights explain."
    )
    parser.add_argument("config", help="config of the float detector, such as configs/digits/mask_rcnn_swin_float.py")
    parser.add_argument("checkpoint", help="its weights")
    parser.add_argument("--data-root", help="folder of the data set (default: the config's)")
    parser.add_argument("--images", type=int, default=16, help="(default: 16)")
    add_debug_option(parser)
    return parser.parse_args()


def main() -> None:
    """Run the tool."""
    args = parse_args()
    with user_errors(args.debug):
        cfg = load_config(Path(args.config))
        if args.data_root:
            set_data_root(cfg, args.data_root)
        print(markdown_tables(measure_config(cfg, args.checkpoint, args.images)))


if __name__ == "__main__":
    main()
