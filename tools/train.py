"""Train a detector or a classifier: ``python tools/train.py CONFIG``."""

import argparse

import mmbivit.uncaught  # noqa: F401  first: for errors of the imports below
from mmbivit.apis import train, train_config, user_errors
from mmbivit.apis.options import add_debug_option, add_run_options, add_trust_option, set_local_rank, trusted


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Train a detector or a classifier, in two stages where the config says so."
    )
    parser.add_argument(
        "config", help="config file, such as configs/mask_rcnn_sibivit_swin_t.py; classifiers: configs/classification/"
    )
    add_run_options(parser)
    parser.add_argument(
        "--amp",
        nargs="?",
        const=True,
        default=False,
        choices=("fp16", "bf16"),
        help="train in mixed precision; without a value, float16 on GPUs and bfloat16 on CPUs",
    )
    parser.add_argument(
        "--accumulate",
        type=int,
        metavar="N",
        help="add up the gradients of N iterations before each step of the optimizer, as if the batch were N times as "
        "large; the learning rate stays, unless --auto-scale-lr is given too",
    )
    parser.add_argument(
        "--auto-scale-lr",
        action="store_true",
        help="scale the learning rate with the images per step of the optimizer, over all processes",
    )
    parser.add_argument(
        "--ema",
        nargs="?",
        const=0.0002,
        type=float,
        metavar="MOMENTUM",
        help="validate and save an exponential moving average of the weights, in which the newest has the weight "
        "MOMENTUM (default: 0.0002, a decay of 0.9998 as in timm); give it again with --resume",
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="CHECKPOINT",
        help="go on from a checkpoint; without one, from the latest in the work dir, if there is one",
    )
    parser.add_argument(
        "--float-checkpoint",
        metavar="FILE",
        help="file, URL or timm://NAME of the float model that student and teacher start from "
        "(default: what the config says); 'none': start at random, without a teacher",
    )
    parser.add_argument(
        "--backbone-checkpoint",
        metavar="FILE",
        help="file or URL of the pretrained binary backbone that a *_finetune.py config starts from",
    )
    parser.add_argument(
        "--binary-parts",
        nargs="*",
        metavar="PART",
        help="which parts of a detector beside its backbone are binary, of neck, rpn, box and mask; without a value, "
        "neck and heads are float (default: what the config says)",
    )
    parser.add_argument("--tensorboard", action="store_true", help="write event files for TensorBoard too")
    parser.add_argument(
        "--wandb",
        nargs="?",
        const="mmbivit",
        metavar="PROJECT",
        help="log to Weights & Biases too (default project: mmbivit)",
    )
    parser.add_argument("--seed", type=int, help="seed of all random numbers")
    parser.add_argument(
        "--skip-non-finite",
        type=int,
        metavar="N",
        help="skip up to N iterations whose loss is infinite or no number, instead of stopping at the first",
    )
    add_trust_option(parser)
    add_debug_option(parser)
    return parser.parse_args()


def main() -> None:
    """Run the tool."""
    args = parse_args()
    set_local_rank(args.local_rank)
    with user_errors(args.debug), trusted(args):
        train(
            train_config(
                args.config,
                work_dir=args.work_dir,
                amp=args.amp,
                accumulate=args.accumulate,
                auto_scale_lr=args.auto_scale_lr,
                ema=args.ema,
                resume=args.resume,
                cfg_options=args.cfg_options,
                launcher=args.launcher,
                data_root=args.data_root,
                float_checkpoint=args.float_checkpoint,
                backbone_checkpoint=args.backbone_checkpoint,
                tensorboard=args.tensorboard,
                wandb=args.wandb,
                seed=args.seed,
                skip_non_finite=args.skip_non_finite,
                binary_parts=args.binary_parts,
            )
        )


if __name__ == "__main__":
    main()
