"""Make digit scenes or digit folders: demo data for detection, segmentation or classification, without a download."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import mmbivit.uncaught  # noqa: F401  first: for errors of the imports below
from mmbivit.datasets.digit_folders import DigitFolders, draw_digit_folders, make_digit_folders
from mmbivit.datasets.digit_scenes import DIGIT_CLASSES, LAYOUTS, SPLITS, DigitScenes, make_digit_scenes
from mmbivit.datasets.scene_drawing import draw_scenes
from mmbivit.files import check_writable

FOLDERS = "folders"
SCENE_DEFAULTS = {"out": Path("data/digit_scenes"), "train": 400, "val": 80, "size": [112], "max_digits": 6}
FOLDER_DEFAULTS = {"out": Path("data/digits"), "train": 8000, "val": 1000, "size": [32]}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)

    def add(flag: str, text: str, **kwargs) -> None:
        name = flag.removeprefix("--").replace("-", "_")
        defaults = [options[name] for options in (SCENE_DEFAULTS, FOLDER_DEFAULTS) if name in options]
        shown = [str(default[0] if isinstance(default, list) else default) for default in defaults]
        note = f"{shown[0]}; of layout folders: {shown[1]}" if len(shown) == 2 else f"{shown[0]}; not of layout folders"
        parser.add_argument(flag, help=f"{text} (default: {note})", **kwargs)

    parser.add_argument(
        "--layout",
        choices=[*LAYOUTS, FOLDERS],
        default="digit_scenes",
        help="digit_scenes: instance segmentation, PNG and ten classes; coco: the same in the tree and the 80 "
        "categories of COCO 2017; folders: classification, a class folder per digit (default: digit_scenes)",
    )
    add("--out", "folder to make", type=Path)
    add("--train", "training images", type=int, metavar="N")
    add("--val", "validation images", type=int, metavar="N")
    add("--size", "side of an image; of a scene also its height and width", type=int, nargs="+", metavar="PIXELS")
    add("--max-digits", "most digits in a scene", type=int, metavar="N")
    parser.add_argument("--seed", type=int, default=0, help="of all random choices (default: 0)")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace data of the same kind; move anything else to OUT.old"
    )
    parser.add_argument("--picture", type=Path, metavar="FILE", help="also draw some of the val images, annotated")
    args = parser.parse_args(argv)
    for name, default in (FOLDER_DEFAULTS if args.layout == FOLDERS else SCENE_DEFAULTS).items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    return args


def make(args: argparse.Namespace, progress: Callable[[], None]) -> DigitScenes | DigitFolders:
    """Make the data set that the command line asks for."""
    size = args.size[0] if len(args.size) == 1 else tuple(args.size)
    common = {"train": args.train, "val": args.val, "size": size, "seed": args.seed}
    common |= {"overwrite": args.overwrite, "progress": progress}
    if args.layout != FOLDERS:
        return make_digit_scenes(args.out, max_digits=args.max_digits, layout=args.layout, **common)
    if args.max_digits is not None:
        raise ValueError("--max-digits is not an option of --layout folders: its images have one digit. Leave it out.")
    if len(args.size) != 1:
        raise ValueError(f"--layout folders makes square images: --size takes one number, got {len(args.size)}")
    return make_digit_folders(args.out, **common)


def summary_table(made: DigitScenes | DigitFolders) -> Table:
    """Images, and in scenes instances, per split and class."""
    scenes = isinstance(made, DigitScenes)
    counts = made.instances if scenes else made.images
    table = Table(title=f"Digit scenes, layout {made.options['layout']}" if scenes else "Digit folders")
    table.add_column("class")
    for split in SPLITS:
        table.add_column(split, justify="right")
    for name in DIGIT_CLASSES:
        table.add_row(name, *(str(counts[split][name]) for split in SPLITS))
    table.add_section()
    if scenes:
        table.add_row("instances", *(str(sum(counts[split].values())) for split in SPLITS))
    table.add_row("scenes" if scenes else "images", *(str(made.options[split]) for split in SPLITS))
    return table


def save_picture(made: DigitScenes | DigitFolders, path: Path) -> None:
    """Draw some images into a file of any format that matplotlib writes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draw = draw_scenes if isinstance(made, DigitScenes) else draw_digit_folders
    draw(made.root).savefig(path)
    if path.suffix.lower() == ".png":  # without the alpha channel, which matplotlib writes and nothing needs
        with Image.open(path) as picture:
            opaque = picture.convert("RGB")
        opaque.save(path, optimize=True)


def main() -> int:
    """Run the tool; returns the exit status."""
    args = parse_args()
    console = Console()
    try:
        if args.picture is not None:
            check_writable("--picture", args.picture)
        with Progress(console=console, transient=True) as bar:
            task = bar.add_task("images", total=args.train + args.val)
            made = make(args, progress=lambda: bar.advance(task))
        console.print(summary_table(made))
        state = "already there, made with the same options" if made.reused else "made"
        console.print(f"{made.root}: {state}", soft_wrap=True, highlight=False, markup=False)
        if args.picture is not None:
            save_picture(made, args.picture)
            console.print(f"{args.picture}: drawn", soft_wrap=True, highlight=False, markup=False)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
