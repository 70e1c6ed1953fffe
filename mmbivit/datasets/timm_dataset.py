"""Image folders, tar files and torchvision's data sets, read by timm, as a data set for MMEngine's runner."""

import logging
import os
import re
import tarfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dataset import Compose
from mmengine.logging import print_log
from PIL import Image
from timm.data import ImageNetInfo, create_dataset
from timm.data.readers.class_map import load_class_map
from timm.data.readers.img_extensions import get_img_extensions
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from timm.utils.misc import natural_key
from torch.utils.data import Dataset

from mmbivit.checks import UserError
from mmbivit.registry import DATASETS

__all__ = ["TimmDataset", "find_split", "read_class_map", "readable_names", "to_rgb"]

MAX_CORRUPT = 10  # in a row, as in timm: more of them mean that the disk or the copy is broken, not a file
SPLIT_NAMES = (("train", "training"), ("val", "valid", "validation", "eval", "evaluation"))  # timm's synonyms
STREAMED = ("hfids", "tfds", "wds")
# Options of timm's create_dataset that would do nothing here, or what a pipeline or a sampler does.
REFUSED = set("additional_features batch_size input_img_mode is_training load_bytes num_samples repeats seed".split())
REFUSED |= {"search_split", "target_transform", "transform"}


@DATASETS.register_module()
class TimmDataset(Dataset):
    """A data set that timm reads, with the items, the length and the ``metainfo`` that MMEngine's runner works with.

    Class ``i`` is the ``i``-th class folder in natural order ("2" before "10"), as in timm, or what ``class_map`` says.
    ``metainfo`` holds ``classes``, their readable names (see :func:`readable_names`), and ``folders``.

    Args:
        data_root: an image folder ``data_root/split/<class>/<image>``, or with one tar file per class in
            ``data_root/split``, or with a tar file ``data_root/split.tar``; or a tar file, whatever ``split`` says.
            For other data sets what timm expects as ``root``.
        split: ``'train'``, ``'val'``, ...; timm's synonyms such as ``'validation'`` find each other's folders. With
            ``''`` the classes are in ``data_root`` itself.
        name: ``''`` for image folders and tar files, ``'torch/<name>'`` (torchvision), ``'hfds/<name>'``.
        pipeline: transforms or their configs, from ``dict(img=<PIL image, RGB>, labels=int, img_path=str)`` to a dict
            with ``inputs``, for example ``[dict(type='mmbivit.TimmTransform')]``. Any image becomes RGB of 8 bits.
        skip_corrupt: take the next image for one that cannot be decoded, and warn once of each, instead of failing.
            For training: in evaluation the next one would count twice, which ``tools/`` refuse.
        class_map: ``{class folder: label}``, or a file of timm's; other class folders are left out.
        options: further options of :func:`timm.data.create_dataset`, such as ``download=True``.

    Raises:
        FileNotFoundError: if there are no images; it names the folder and what was expected in it.
        ValueError: for a setting or a folder that cannot be right, and from an item that cannot be decoded.
    """

    def __init__(
        self,
        data_root: str | os.PathLike,
        split: str = "train",
        name: str = "",
        pipeline: Sequence = (),
        skip_corrupt: bool = False,
        class_map: Mapping[str, int] | str | None = None,
        **options: Any,
    ):
        _check_name(name)
        if wrong := sorted(REFUSED & options.keys()):
            raise UserError(f"TimmDataset has no options {', '.join(wrong)}: images are RGB and go into the pipeline")
        self._title = f"{name or data_root}/{split}"
        self._source, self._reader = _open(str(data_root), split, name, class_map, options)
        folders = _class_folders(self._source, self._reader)
        self.metainfo = dict(classes=readable_names(folders), folders=folders) if folders else {}
        self.pipeline = Compose(pipeline)
        self.skip_corrupt = skip_corrupt
        # Shared, so that a file is reported once and not by every worker process.
        self._reported = torch.zeros(len(self), dtype=torch.bool).share_memory_() if skip_corrupt else None

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return ``dict(inputs=..., labels=int, img_path=str)``, the inputs as the pipeline makes them."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index}, but {self._title} has {len(self)} images")
        results = self.pipeline(self._load(index))
        if results is None or "inputs" not in results:
            raise UserError(
                "the pipeline of TimmDataset returns no 'inputs': end it with dict(type='mmbivit.TimmTransform')"
            )
        return {key: results[key] for key in ("inputs", "labels", "img_path")}

    def _load(self, index: int) -> dict[str, Any]:
        for attempt in range(min(MAX_CORRUPT, len(self))):
            position = (index + attempt) % len(self)
            path = self._path(position)
            try:
                image, label = self._decode(position)
                return dict(img=image, labels=label, img_path=path)
            except Exception as error:  # Pillow's decoders raise almost anything
                if isinstance(error, OSError) and error.errno is not None:
                    raise  # missing, no permission, too many open files: not the image's fault
                if not self.skip_corrupt:
                    raise UserError(
                        f"{path} cannot be decoded ({error}): replace it, or set skip_corrupt=True in the data set, "
                        "which skips such images"
                    ) from error
                self._report(position, path, error)
        raise UserError(
            f"{attempt + 1} images in a row cannot be decoded, the last one is {path}: "
            f"too many for skip_corrupt=True, so copy or unpack {self._title} again"
        )

    def _decode(self, index: int) -> tuple[Image.Image, int]:
        if self._reader is None:
            image, label = self._source[index]
            return to_rgb(image), int(label)
        file, label = self._reader[index]
        with file:
            return to_rgb(Image.open(file)), int(label)

    def _path(self, index: int) -> str:
        if isinstance(self._reader, ReaderImageInTar):
            _, tar, _ = self._reader.samples[index]
            return os.path.join(self._reader.root, tar or "", self._reader.filename(index))
        samples = getattr(self._source, "samples", None)
        return samples[index][0] if samples else f"{self._title}[{index}]"

    def _report(self, index: int, path: str, error: Exception) -> None:
        if not self._reported[index]:
            self._reported[index] = True
            print_log(f"Skipped {path}, which cannot be decoded: {error}", "current", logging.WARNING)


def to_rgb(image: Image.Image) -> Image.Image:
    """Make any image RGB of 8 bits.

    Of 16 bits the upper 8 stay, as in OpenCV; Pillow would make everything above 255 white.

    Raises:
        ValueError: for 32 bits, whose range is unknown.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):  # early Pillow reads PNG so
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise UserError("it has 32 bits per pixel, allowed are 8 and 16")
    return image.convert("RGB")


def readable_names(folders: Sequence[str]) -> tuple[str, ...]:
    """Name classes: the first term that timm knows for a WordNet id such as ``n01440764``, else the folder's name.

    Names stay unique: the two cranes of ImageNet become ``'crane (n02012849)'`` and ``'crane (n03126707)'``.
    """
    if not any(re.fullmatch(r"n\d{8}", folder) for folder in folders):
        return tuple(folders)
    info = ImageNetInfo()
    names = []
    for folder in folders:
        try:
            names.append(info.label_name_to_description(folder).split(",")[0].strip())
        except KeyError:
            names.append(folder)
    counts = Counter(names)
    return tuple(
        name if counts[name] == 1 else f"{name} ({folder})" for name, folder in zip(names, folders, strict=True)
    )


def _check_name(name: str) -> None:
    prefix, separator, rest = name.partition("/")
    if prefix.lower() in STREAMED:
        raise UserError(
            f"name={name!r} is streamed: it has neither length nor index, which MMEngine's samplers need. Use an image "
            "folder or tar files (name=''), 'torch/...' or 'hfds/...'"
        )
    if name and not (prefix.lower() in ("torch", "hfds") and rest):
        raise UserError(f"name={name!r}; allowed: '' (image folder or tar files), 'torch/<name>', 'hfds/<name>'")


def _open(data_root: str, split: str, name: str, class_map: Any, options: dict) -> tuple[Any, Any]:
    """Return timm's data set (or only its reader) and its reader, ``None`` where torchvision reads."""
    kind, _, rest = name.lower().partition("/")
    if kind == "hfds":
        source = create_dataset(name, data_root or None, split, class_map=read_class_map(class_map), **options)
        return source, source.reader
    if kind == "torch":
        if class_map:
            raise UserError(f"class_map={class_map!r} needs an image folder or tar files, {name} has its own classes")
        if rest in ("folder", "image_folder"):
            data_root = str(find_split(data_root, split))
        return _open_torchvision(data_root, split, name, options), None
    root = find_split(data_root, split)
    reader = _open_folder(root, read_class_map(class_map, root), options, _expected(data_root, split))
    if not class_map:
        _check_classes(list(_class_to_idx(reader)), _expected(data_root, split))
    return reader, reader


def _open_torchvision(data_root: str, split: str, name: str, options: dict) -> Dataset:
    try:
        source = create_dataset(name, data_root, split, search_split=False, **options)
    except (RuntimeError, FileNotFoundError) as error:  # torchvision's ways to say that files are missing
        raise FileNotFoundError(f"{name} is not in data_root={data_root!r}: {error}") from error
    except (AssertionError, TypeError) as error:
        raise UserError(f"name={name!r} with options {options}: {error}") from error
    if getattr(source, "train", None) is False and split not in (*SPLIT_NAMES[1], "test"):
        raise UserError(
            f"split={split!r}; {name} has 'train' and 'test' (also called 'val')"
        )  # timm takes any for test
    return source


def _open_folder(root: Path, class_map: dict | None, options: dict, expected: str) -> Any:
    """Return timm's reader of a folder of class folders, a tar file, or a folder of tar files."""
    tars = [root] if root.is_file() else sorted(root.glob("*.tar"))
    # Archives that were unpacked beside themselves are left alone.
    is_tar = bool(tars) and not (root.is_dir() and any(path.is_dir() for path in root.iterdir()))
    try:
        if is_tar:
            # Without the cache: worker processes must not share the position in an open file.
            return ReaderImageInTar(str(root), class_map or "", **{"cache_tarfiles": False, **options})
        return create_dataset("", str(root), search_split=False, class_map=class_map, **options).reader
    except TypeError as error:
        raise UserError(f"options {options} of TimmDataset: {error}") from error
    except tarfile.TarError as error:
        raise UserError(f"{root} cannot be read as tar: {error}") from error
    except (RuntimeError, ValueError) as error:  # what timm's readers end in when they find nothing
        kinds = ", ".join(get_img_extensions())
        chosen = f" of the classes in class_map ({', '.join(list(class_map)[:3])}, ...)" if class_map else ""
        raise FileNotFoundError(f"no images ({kinds}){chosen} in {root}; {expected}") from error


def find_split(data_root: str, split: str) -> Path:
    """Return the folder or tar file of a split.

    timm would fall back to ``data_root`` itself: a forgotten folder ``val`` then means validation on all images, with
    wrong labels.
    """
    if not isinstance(split, str):
        raise UserError(f"split={split!r}; allowed: the name of a folder, such as 'train', or ''")
    root = Path(data_root)
    if not split or (root.is_file() and root.suffix == ".tar"):
        names = [""]
    else:
        names = [split, *(name for group in SPLIT_NAMES if split in group for name in group if name != split)]
    for name in names:
        for path in (root / name, root / f"{name}.tar") if name else (root,):
            if path.is_dir() or (path.is_file() and path.suffix == ".tar"):
                return path
    raise FileNotFoundError(f"there is no {root / split}; {_expected(data_root, split)}")


def _expected(data_root: str, split: str) -> str:
    if data_root.endswith(".tar"):
        return "expected <class>/<image> in it"
    hint = ", or split='' if the class folders are in data_root itself" if split else ""
    return f"expected the tree {os.path.join(data_root, split, '<class>', '<image>')} (data_root/split/...){hint}"


def read_class_map(class_map: Mapping[str, int] | str | None, root: Path | str = "") -> dict[str, int] | None:
    """Return the label of each class folder from a dict or a file of timm's, looked for in ``root`` too."""
    if not class_map:
        return None
    try:
        mapping = load_class_map(class_map if isinstance(class_map, str) else dict(class_map), str(root))
    except AssertionError as error:
        raise UserError(f"class_map={class_map!r}: {error}; allowed: a dict, a .txt or a .pkl file") from error
    if wrong := {key: label for key, label in mapping.items() if not isinstance(label, int) or label < 0}:
        raise UserError(f"class_map has labels that are no integers of 0 or more: {wrong}")
    return {key: label for key, label in mapping.items() if key}  # a file may end in an empty line


def _check_classes(names: list[str], expected: str) -> None:
    """Refuse what timm would take for classes in a folder that is laid out otherwise."""
    if stray := [name for name in names if not name or name.startswith(".")]:
        where = f"the hidden folder '{stray[0]}'" if stray[0].strip(".") else "no class folder"
        raise UserError(f"there are images in {where}, which would count as a class; {expected}")
    if len(names) == 1:
        raise UserError(
            f"all images are in folders called '{names[0]}', which is only one class (the innermost folder names the "
            f"class); {expected}, or a class_map"
        )
    by_key: dict[tuple, str] = {}
    for name in names:
        if (other := by_key.setdefault(tuple(natural_key(name)), name)) != name:
            raise UserError(
                f"class folders '{other}' and '{name}' have no order in timm's sorting: rename one or give a class_map"
            )


def _class_to_idx(reader: Any) -> dict[str, int]:
    return reader.class_name_to_idx if isinstance(reader, ReaderImageInTar) else getattr(reader, "class_to_idx", {})


def _class_folders(source: Any, reader: Any) -> tuple[str, ...]:
    """Names of the classes by label; empty if the data set does not know them."""
    if reader is None:
        # ImageNet has tuples of names there, and iNaturalist has another attribute
        names = getattr(source, "wnids", None) or getattr(source, "classes", None)
        return tuple(names or getattr(source, "all_categories", ()))
    by_label: dict[int, list[str]] = {}
    for folder, label in _class_to_idx(reader).items():
        by_label.setdefault(label, []).append(folder)
    return tuple("/".join(by_label.get(label, [f"unused_{label}"])) for label in range(max(by_label, default=-1) + 1))
