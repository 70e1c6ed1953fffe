"""Make the digit scenes, demo data for detection and instance segmentation that needs no download."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from mmbivit.datasets.digit_scenes import DIGIT_CLASSES, LAYOUTS, SPLITS, DigitScenes, make_digit_scenes
from mmbivit.datasets.scene_drawing import draw_scenes


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/digit_scenes"), help="folder to make")
    parser.add_argument("--train", type=int, default=400, metavar="N", help="training scenes")
    parser.add_argument("--val", type=int, default=80, metavar="N", help="validation scenes")
    parser.add_argument(
        "--size", type=int, nargs="+", default=[112], metavar="PIXELS", help="side of a scene, or its height and width"
    )
    parser.add_argument("--max-digits", type=int, default=6, metavar="N", help="most digits in a scene")
    parser.add_argument("--seed", type=int, default=0, help="of all random choices")
    parser.add_argument(
        "--layout",
        choices=LAYOUTS,
        default="digit_scenes",
        help="digit_scenes: PNG and ten classes; coco: the tree and the 80 categories of COCO 2017",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace digit scenes; move anything else in the way to OUT.old"
    )
    parser.add_argument("--picture", type=Path, metavar="FILE", help="also draw twelve annotated val scenes")
    return parser.parse_args()


def summary_table(scenes: DigitScenes) -> Table:
    """Scenes and instances per split and class."""
    table = Table(title=f"Digit scenes, layout {scenes.options['layout']}")
    table.add_column("class")
    for split in SPLITS:
        table.add_column(split, justify="right")
    for name in DIGIT_CLASSES:
        table.add_row(name, *(str(scenes.instances[split][name]) for split in SPLITS))
    table.add_section()
    table.add_row("instances", *(str(sum(scenes.instances[split].values())) for split in SPLITS))
    table.add_row("scenes", *(str(scenes.options[split]) for split in SPLITS))
    return table


def save_picture(scenes: DigitScenes, path: Path) -> None:
    """Draw twelve scenes into a file of any format that matplotlib writes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_scenes(scenes.root).savefig(path)
    if path.suffix.lower() == ".png":  # without the alpha channel, which matplotlib writes and nothing needs
        with Image.open(path) as picture:
            opaque = picture.convert("RGB")
        opaque.save(path, optimize=True)


def main() -> int:
    """Run the tool; returns the exit status."""
    args = parse_args()
    console = Console()
    try:
        with Progress(console=console, transient=True) as bar:
            task = bar.add_task("scenes", total=args.train + args.val)
            scenes = make_digit_scenes(
                args.out,
                train=args.train,
                val=args.val,
                size=args.size[0] if len(args.size) == 1 else tuple(args.size),
                max_digits=args.max_digits,
                seed=args.seed,
                layout=args.layout,
                overwrite=args.overwrite,
                progress=lambda: bar.advance(task),
            )
        console.print(summary_table(scenes))
        state = "already there, made with the same options" if scenes.reused else "made"
        console.print(f"{scenes.root}: {state}", soft_wrap=True, highlight=False, markup=False)
        if args.picture is not None:
            save_picture(scenes, args.picture)
            console.print(f"{args.picture}: drawn", soft_wrap=True, highlight=False, markup=False)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
