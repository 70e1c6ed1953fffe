"""Draw what a network does: ``python tools/analysis_tools/plot.py PICTURE ... --out FILE.png``."""

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING

from rich.console import Console

import mmbivit.uncaught  # noqa: F401  first: for errors of the imports below
from mmbivit.analysis.figures.style import check_format, save_figure
from mmbivit.apis import user_errors
from mmbivit.apis.options import add_debug_option, add_trust_option, trusted
from mmbivit.engine.quiet import quiet
from mmbivit.files import check_writable

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Draw a picture of what a binary network does, as PNG or SVG.")
    pictures = parser.add_subparsers(title="pictures", metavar="PICTURE", required=True)

    def add(name: str, draw: Callable[[argparse.Namespace], "Figure"], text: str) -> argparse.ArgumentParser:
        picture = pictures.add_parser(name, help=text, description=text)
        picture.set_defaults(draw=draw)
        picture.add_argument(
            "--out", metavar="FILE", default=f"{name}.png", help="the picture, .png or .svg (default: %(default)s)"
        )
        add_debug_option(picture)
        return picture

    def add_model(picture: argparse.ArgumentParser) -> None:
        picture.add_argument("config", help="config file of a detector or classifier")
        picture.add_argument("checkpoint", help="file or URL of its weights, of training stage 2")
        add_trust_option(picture)

    picture = add("balancing", draw_balancing, "balancing factors alpha of each block (SI-BiViT, Figure 5)")
    add_model(picture)

    picture = add("attention", draw_attention, "which tokens a token attends to, beside the float teacher's attention")
    add_model(picture)
    picture.add_argument("image", help="image file")
    picture.add_argument(
        "--block", metavar="NAME", help="such as stages.0.blocks.1 (default: the last block of the first stage)"
    )
    picture.add_argument(
        "--query", nargs=2, type=int, metavar=("X", "Y"), help="pixel whose token is asked (default: the middle)"
    )
    picture.add_argument(
        "--teacher-checkpoint", metavar="FILE", help="weights of the config's teacher (default: what the config names)"
    )

    picture = add("activations", draw_activations, "what is binarized, with the thresholds, in each layer of a block")
    add_model(picture)
    picture.add_argument("images", nargs="+", help="image files, folders and glob patterns")
    picture.add_argument(
        "--block", metavar="NAME", help="such as stages.0.blocks.1 (default: the last block of the first stage)"
    )

    picture = add("flips", draw_flips, "how many weights flip their sign per epoch, logged by mmbivit.SignFlipsHook")
    picture.add_argument("work_dir", metavar="WORK_DIR", help="work dir of a training run")

    picture = add(
        "curves", draw_curves, "losses, learning rate and metrics of both training stages, from the JSON logs"
    )
    picture.add_argument("work_dir", metavar="WORK_DIR", help="work dir of a training run")
    picture.add_argument("--keys", nargs="+", metavar="KEY", help="entries of the log to draw (default: a selection)")

    picture = add("detections", draw_detections, "detections of several detectors side by side")
    picture.add_argument("images", nargs="+", help="image files, folders and glob patterns")
    picture.add_argument(
        "--model",
        nargs=3,
        action="append",
        required=True,
        metavar=("TITLE", "CONFIG", "CHECKPOINT"),
        help="a detector; give the option once for each",
    )
    picture.add_argument("--annotations", metavar="FILE", help="COCO annotations of the images, drawn first")
    picture.add_argument(
        "--score-thr", type=float, default=0.5, help="lowest score that is drawn (default: %(default)s)"
    )

    picture = add("interaction", draw_interaction, "spatial interaction capability of each block (SI-BiViT, Eq. 6)")
    picture.add_argument("config", help="config file of a detector or classifier")
    picture.add_argument(
        "--shape", nargs=2, type=int, metavar=("H", "W"), help="size of the image in pixels (default: as complexity.py)"
    )

    picture = add("network", draw_network, "stages and parts of the backbone, and which are binary")
    picture.add_argument("config", help="config file of a detector or classifier")

    picture = add(
        "conflict", draw_conflict, "gradient of distillation along and against the task's (SI-BiViT, Figure 4b)"
    )
    add_model(picture)
    picture.add_argument("--batches", type=int, default=4, help="batches of training data (default: %(default)s)")
    picture.add_argument("--seed", type=int, default=0, help="of the batches (default: %(default)s)")
    picture.add_argument("--data-root", metavar="DIR", help="folder of the data set, as in tools/train.py")
    picture.add_argument(
        "--teacher-checkpoint", metavar="FILE", help="weights of the config's teacher (default: what the config names)"
    )
    return parser.parse_args()


# Each function imports what its picture needs: some need no more than a log.


def draw_balancing(args: argparse.Namespace) -> "Figure":
    """Draw balancing factors."""
    from mmbivit.report.plots.balancing import plot_balancing

    return plot_balancing(args.config, args.checkpoint)


def draw_attention(args: argparse.Namespace) -> "Figure":
    """Draw attention of student and teacher."""
    from mmbivit.report.plots.attention import plot_attention

    query = None if args.query is None else tuple(args.query)
    options = dict(block=args.block, query=query, teacher_checkpoint=args.teacher_checkpoint)
    return plot_attention(args.config, args.checkpoint, args.image, **options)


def draw_activations(args: argparse.Namespace) -> "Figure":
    """Draw what is binarized."""
    from mmbivit.report.plots.activations import plot_activations

    return plot_activations(args.config, args.checkpoint, args.images, block=args.block)


def draw_flips(args: argparse.Namespace) -> "Figure":
    """Draw flips of signs."""
    from mmbivit.report.plots.flips import plot_flips

    return plot_flips(args.work_dir)


def draw_curves(args: argparse.Namespace) -> "Figure":
    """Draw training curves."""
    from mmbivit.report.plots.curves import plot_curves

    return plot_curves(args.work_dir, keys=args.keys)


def draw_detections(args: argparse.Namespace) -> "Figure":
    """Draw detections of several detectors."""
    from mmbivit.report.plots.detections import plot_detections

    models = [tuple(model) for model in args.model]
    return plot_detections(args.images, models, annotations=args.annotations, score_thr=args.score_thr)


def draw_interaction(args: argparse.Namespace) -> "Figure":
    """Draw spatial interaction, and print its table."""
    from mmbivit.analysis.figures.interaction import interaction_figure
    from mmbivit.report.plots.interaction import interaction_table, measure_interaction

    capability = measure_interaction(args.config, None if args.shape is None else tuple(args.shape))
    Console().print(interaction_table(capability))
    return interaction_figure(capability)


def draw_network(args: argparse.Namespace) -> "Figure":
    """Draw the backbone of a config."""
    from mmbivit.report.plots.network import plot_network

    return plot_network(args.config)


def draw_conflict(args: argparse.Namespace) -> "Figure":
    """Draw the conflict of gradients, and print its table."""
    from mmbivit.analysis.figures.conflict import conflict_figure
    from mmbivit.report.plots.conflict import conflict_table, measure_conflict

    options = dict(batches=args.batches, seed=args.seed, data_root=args.data_root)
    options["teacher_checkpoint"] = args.teacher_checkpoint
    conflict = measure_conflict(args.config, args.checkpoint, **options)
    Console().print(conflict_table(conflict))
    return conflict_figure(conflict)


def main() -> None:
    """Run the tool."""
    args = parse_args()
    trust = trusted(args) if "trust_checkpoint" in args else nullcontext()
    with user_errors(args.debug), trust, quiet():
        check_format(args.out)
        check_writable("--out", args.out)
        save_figure(args.draw(args), args.out)
        print(f"Wrote {args.out}.")


if __name__ == "__main__":
    main()
