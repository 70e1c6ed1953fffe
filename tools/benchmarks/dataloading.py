"""How fast are images loaded, compared with timm and with what training needs? A Markdown table."""

import argparse
import os
import tempfile
from pathlib import Path

import mmbivit.uncaught  # noqa: F401  first: for errors of the imports below
from mmbivit import get_config
from mmbivit.apis import user_errors
from mmbivit.apis.options import add_debug_option
from mmbivit_benchmarks.dataloading import make_images, markdown_table, measure_loaders, measure_steps


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Time the training data loader of a classifier's config, timm's loader with the same transforms "
        "(epochs in turn, warm worker processes, DeiT augmentation, normalisation, random erasing; no Mixup), and "
        "training steps on the CPU, on JPEG images of 500 x 375 pixels. Loading and training are timed one after the "
        "other.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--config", default="classification/sibivit_swin_t_imagenet", help="name of a shipped config")
    parser.add_argument("--images", type=int, default=512, help="number of images to make, in 8 classes")
    parser.add_argument("--batch-size", type=int, default=32, help="batch size of the loaders")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="worker processes of each loader")
    parser.add_argument("--repeats", type=int, default=15, help="epochs of each loader")
    parser.add_argument("--step-batch-size", type=int, default=8, help="batch size of the training steps")
    parser.add_argument("--steps", type=int, default=5, help="training steps in each stage; 0 leaves them out")
    add_debug_option(parser)
    return parser.parse_args()


def main() -> None:
    """Run the tool."""
    args = parse_args()
    from mmengine.logging import MMLogger  # not above, where it would come before mmbivit.uncaught

    MMLogger.get_instance("benchmark", log_level="WARNING")  # else a line for each parameter of the optimizer
    with user_errors(args.debug), tempfile.TemporaryDirectory() as root:
        cfg = get_config(args.config)
        size = make_images(Path(root), args.images)
        loaders = measure_loaders(cfg, Path(root), args.batch_size, args.workers, args.repeats)
        steps = measure_steps(cfg, args.step_batch_size, args.steps) if args.steps else {}
        print(
            f"{args.images} images of {size / 1000:.0f} kB on average, batch size {args.batch_size}, "
            f"{args.workers} workers, {args.repeats} epochs; training: batch size {args.step_batch_size}, "
            f"{args.steps} steps\n"
        )
        print(markdown_table(loaders, steps))


if __name__ == "__main__":
    main()
