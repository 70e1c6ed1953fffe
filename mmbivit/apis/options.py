"""Command line options that the tools share."""

import argparse
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from mmengine.config import DictAction

from mmbivit.checkpoints import trust_checkpoints

from .images import MAX_PIXELS

__all__ = [
    "ConfigOptions",
    "add_debug_option",
    "add_prediction_options",
    "add_run_options",
    "add_trust_option",
    "set_local_rank",
    "trusted",
]


class ConfigOptions(DictAction):
    """``KEY=VALUE ...`` as MMEngine reads it, but with argparse's error for what is not of that form."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *args: Any) -> None:
        for value in values:
            if not value.partition("=")[0] or "=" not in value:
                raise argparse.ArgumentError(self, f"expected KEY=VALUE, got {value!r}")
        try:
            super().__call__(parser, namespace, values, *args)
        except (AssertionError, RecursionError) as error:
            raise argparse.ArgumentError(self, f"unbalanced or too many brackets in {' '.join(values)}") from error


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add what training and evaluation have in common."""
    parser.add_argument(
        "--work-dir", metavar="DIR", help="where logs and checkpoints go (default: work_dirs/<config's name>)"
    )
    parser.add_argument(
        "--data-root",
        metavar="DIR",
        help="folder of the data set: in COCO's layout for a detector, DIR/{train,val}/<class>/ for a classifier",
    )
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=ConfigOptions,
        metavar="KEY=VALUE",
        help="change the config, for example model.backbone.with_cp=True train_dataloader.batch_size=4; "
        'a list is key="[a,b]" or key=a,b, nested ones key="[(a,b),(c,d)]", without white space',
    )
    parser.add_argument(
        "--launcher", choices=("none", "pytorch", "slurm", "mpi"), default="none", help="who starts the processes"
    )
    # torch.distributed.launch passes --local-rank, older versions of it --local_rank.
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)


def add_debug_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--debug``."""
    parser.add_argument("--debug", action="store_true", help="show the traceback of every error (or MMBIVIT_DEBUG=1)")


def add_prediction_options(parser: argparse.ArgumentParser) -> None:
    """Add the images, and what predictions have in common."""
    parser.add_argument("images", nargs="+", metavar="IMAGES", help="image files, folders of images, glob patterns")
    parser.add_argument(
        "--out-dir",
        metavar="DIR",
        help="a detector's pictures go to DIR/vis and its detections as JSON to DIR/preds (needed); "
        "a classifier's classes go as JSON to DIR/preds (default: only printed), and it writes no pictures",
    )
    parser.add_argument(
        "--score-thr", type=float, metavar="SCORE", help="detectors only: lowest score that is drawn (default: 0.3)"
    )
    parser.add_argument("--topk", type=int, metavar="N", help="classifiers only: classes per image (default: 5)")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="images per forward pass (default: 1)")
    parser.add_argument(
        "--max-pixels",
        type=int,
        default=MAX_PIXELS,
        metavar="N",
        help="leave images of more pixels out, without decoding them, since a file of 1 MB may have more than memory "
        f"holds: a detector takes 150 bytes for each (default: {MAX_PIXELS})",
    )


def add_trust_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--trust-checkpoint``."""
    parser.add_argument(
        "--trust-checkpoint",
        action="store_true",
        help="load the checkpoints that this command line names with all that they hold, if they are not weights "
        "alone: THEY CAN RUN ANY CODE on this machine; other files, such as those in the config, stay weights-only",
    )


def trusted(args: argparse.Namespace) -> AbstractContextManager[None]:
    """Make a context in which the checkpoints that a command line names may hold anything, if it says so."""
    if not args.trust_checkpoint:
        return nullcontext()
    names = ("checkpoint", "source", "resume", "float_checkpoint", "backbone_checkpoint")
    files = [getattr(args, name, None) for name in names]
    files += [pair[1] for name in ("float", "binary") if (pair := getattr(args, name, None))]
    options = getattr(args, "cfg_options", None) or {}
    files += [value for key, value in options.items() if key.endswith(("load_from", "checkpoint"))]
    return trust_checkpoints(*(file for file in files if isinstance(file, str)))


def set_local_rank(local_rank: int) -> None:
    """Tell MMEngine which process of this machine it is, where the launcher has not."""
    os.environ.setdefault("LOCAL_RANK", str(local_rank))
