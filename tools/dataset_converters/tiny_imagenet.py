"""Bring Tiny-ImageNet into class folders: python tools/dataset_converters/tiny_imagenet.py data/tiny-imagenet-200

Extract the official archive first: unzip -q tiny-imagenet-200.zip -d data
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.progress import track

import mmbivit.uncaught  # noqa: F401  first: for errors of the imports below
from mmbivit.datasets.tiny_imagenet import NUM_CLASSES, OFFICIAL_COUNTS, convert_tiny_imagenet


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", type=Path, metavar="DIR", help="the extracted folder tiny-imagenet-200")
    parser.add_argument(
        "--out", type=Path, metavar="OUT", help="make the class folders here, of hard links or copies (default: in DIR)"
    )
    return parser.parse_args()


def main() -> int:
    """Run the tool; returns the exit status."""
    args = parse_args()
    try:
        out = convert_tiny_imagenet(
            args.dir, args.out, progress=lambda moves: track(moves, description="images", transient=True)
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: run it again to go on", file=sys.stderr)
        return 130
    counts = " and ".join(f"{number} {split}" for split, number in OFFICIAL_COUNTS.items())
    print(f"{out}: {NUM_CLASSES} classes with {counts} images each")
    return 0


if __name__ == "__main__":
    sys.exit(main())
