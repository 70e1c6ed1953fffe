"""Image files for predictions: those that cannot be used are noted, and the others are predicted."""

import glob
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
from mmengine.config import Config
from mmengine.dist import get_rank
from PIL import Image
from rich.console import Console
from rich.progress import track

from mmbivit.checks import UserError
from mmbivit.datasets.wrappers import inner_dataset

__all__ = ["MAX_PIXELS", "check_is_image", "find_images", "load_usable", "progress", "transforms_of"]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
THREADS, BATCHES_AHEAD = 2, 2  # for loading; batches that wait take memory
MAX_PIXELS = 50_000_000  # a detector that draws its detections takes about 150 bytes for each, a classifier 7


def find_images(inputs: Sequence[str | Path], unique_names: bool = True) -> list[Path]:
    """Expand files, folders (their images, not those of folders inside) and glob patterns to image files.

    Args:
        inputs: the files, folders and patterns.
        unique_names: refuse two files of the same name up to the suffix, which would write to the same output.

    Raises:
        FileNotFoundError: if a file does not exist, or a folder or pattern has no image.
        ValueError: if a name is not unique.
    """
    found: list[Path] = []
    for item in map(str, inputs):
        if Path(item).is_dir():
            names = (file for file in Path(item).iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
            files = sorted(file for file in names if not file.is_dir())
            if not files:
                raise FileNotFoundError(f"folder {item} has no image")
        elif Path(item).exists():
            files = [Path(item)]
        elif not glob.has_magic(item):
            raise FileNotFoundError(f"image {item} does not exist")
        else:
            files = sorted(Path(file) for file in glob.glob(item, recursive=True) if not Path(file).is_dir())
            if not files:
                raise FileNotFoundError(f"no file matches {item}")
        found += files
    found = list(dict.fromkeys(found))
    name, count = Counter(file.stem for file in found).most_common(1)[0] if found else ("", 0)
    if unique_names and count > 1:
        same = ", ".join(str(file) for file in found if file.stem == name)
        raise UserError(f"{same}: outputs are named after the image, so give images of equal names in separate calls")
    return found


def transforms_of(cfg: Config) -> list[dict[str, Any]]:
    """Return the transforms of a config's test data, of its validation data if it has none.

    Raises:
        ValueError: if it has neither.
    """
    loader = cfg.get("test_dataloader") or cfg.get("val_dataloader")
    pipeline = inner_dataset(loader["dataset"]).get("pipeline") if loader else None
    if not pipeline:
        raise UserError(f"{cfg.filename} has no test_dataloader with a pipeline, whose transforms images need")
    return pipeline


def progress(description: str, batches: Iterable[Any], total: int, console: Console | None = None) -> Iterable[Any]:
    """Show a bar while batches are used; of several processes the first shows it."""
    return track(batches, description, total, console=console, disable=get_rank() != 0)


def load_usable(
    batches: Iterable[Sequence[Path]], load: Callable[[Path], Any], problems: dict[Path, str], max_pixels: int
) -> Iterator[list[tuple[Path, Any]]]:
    """Load images in batches, the next ones by threads while this one is used, and note which cannot be used.

    Args:
        batches: the images.
        load: makes what the network takes of a file; raises an OSError or a ValueError for an image that it cannot use.
        problems: gets a line that names the file, for each image that cannot be used.
        max_pixels: an image of more pixels is not decoded.

    Yields:
        Of each batch the files that could be used, with what ``load`` made of them.
    """

    def attempt(file: Path) -> tuple[Any, str | None]:
        try:
            check_is_image(file)
            _check_size(file, max_pixels)
            return load(file), None
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            return None, reason if str(file) in reason else f"{file}: {reason}"

    # OpenCV and Pillow decode without Python's lock.
    pool = ThreadPoolExecutor(THREADS, "images")
    waiting: deque[list[tuple[Path, Future]]] = deque()
    with _no_limit_of_pillow():
        try:
            for batch in batches:
                waiting.append([(file, pool.submit(attempt, file)) for file in batch])
                if len(waiting) > BATCHES_AHEAD:
                    yield _usable(waiting.popleft(), problems)
            while waiting:
                yield _usable(waiting.popleft(), problems)
        finally:
            pool.shutdown(cancel_futures=True)


def _usable(batch: Iterable[tuple[Path, Future]], problems: dict[Path, str]) -> list[tuple[Path, Any]]:
    loaded = []
    for file, future in batch:
        item, problem = future.result()
        if problem is None:
            loaded.append((file, item))
        else:
            problems[file] = problem
    return loaded


def check_is_image(file: Path) -> None:
    """Raise an OSError or a ValueError for a file that cannot be read or does not begin as an image does."""
    if not file.is_file():
        raise UserError(f"{file} is no file" if file.exists() else f"image {file} does not exist")
    with file.open("rb") as opened:
        if not opened.read(1):
            raise UserError(f"{file} is empty")
    if not cv2.haveImageReader(str(file)):
        raise UserError(f"{file} is no image that can be read")


def _check_size(file: Path, max_pixels: int) -> None:
    """Raise a ValueError for an image of too many pixels, without decoding it."""
    width, height = _size(file)
    if width * height > max_pixels:
        raise UserError(
            f"{file} has {width} x {height} pixels, more than --max-pixels {max_pixels} and so not decoded; "
            "give more if you trust the file and have the memory"
        )


def _size(file: Path) -> tuple[int, int]:
    """Return width and height from an image's header, 0 x 0 if only OpenCV knows the format."""
    try:
        with Image.open(file) as image:
            return image.size
    except Exception:  # Pillow's readers raise almost anything
        return 0, 0


@contextmanager
def _no_limit_of_pillow() -> Iterator[None]:
    """Take Pillow's own limit away, which warns from 89 million pixels on and refuses twice as many."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before
