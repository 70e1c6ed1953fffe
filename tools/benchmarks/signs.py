"""What signs keep of a float detector's neck and heads: shares of variance, layer by layer, and at the border."""

import argparse
from pathlib import Path

import torch
from mmengine.registry import init_default_scope
from mmengine.runner import Runner

import mmbivit.uncaught  # noqa: F401  first: for errors of the imports below
from mmbivit.apis import load_config, user_errors
from mmbivit.apis.checkpoints import load_trained_model
from mmbivit.apis.options import add_debug_option
from mmbivit.datasets import set_data_root
from mmbivit_benchmarks.signs import markdown_tables, measure


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
        init_default_scope(cfg.get("default_scope", "mmdet"))
        model = load_trained_model(cfg, args.checkpoint)
        loader = cfg.val_dataloader
        loader.update(batch_size=args.images, num_workers=0, persistent_workers=False)
        batch = model.data_preprocessor(next(iter(Runner.build_dataloader(loader, seed=0))))
        torch.manual_seed(0)
        print(markdown_tables(measure(model, lambda: model(**batch, mode="predict"))))


if __name__ == "__main__":
    main()
