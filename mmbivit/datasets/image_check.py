"""Finds out before a run whether its image folders are there and fit the model, and says what to do if not.

timm's folder reader takes what it finds: images without class folders become one class, and classes are numbered anew
in each split. None of this is an error there, but training goes wrong.
"""

from __future__ import annotations

import os
import os.path as osp
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from mmengine.config import Config
from timm.data import get_img_extensions
from timm.utils.misc import natural_key

from mmbivit.checks import UserError

from .coco_check import MODES, advise_data_root, check_modes, draw_tree, find_datasets, is_timm_dataset, is_type
from .timm_dataset import find_split, read_class_map

CONVERTER = "python tools/dataset_converters/tiny_imagenet.py"
SHOWN_CLASSES = 5


def check_image_data(cfg: Config, modes: Sequence[str] = MODES) -> None:
    """Check that the data of a config's :class:`mmbivit.TimmDataset` exists and fits the model.

    Datasets are found inside wrappers too. Image folders are looked at one level deep: each class folder up to its
    first image. Of tar files and ``torch/...`` datasets only the existence is checked; ``hfds/...`` and data on remote
    storage (``s3://...``) are left to their libraries.

    Args:
        cfg: Config of a runner.
        modes: Which of ``train``, ``val`` and ``test`` to check.

    Raises:
        FileNotFoundError: Something is missing, or lies where it would not be found or would be labelled wrongly. The
            message has all of it, the expected tree, and what to do.
        ValueError: The classes differ between the datasets or from the model's ``num_classes``, the backbone cannot
            take the ``input_size``, a data set of an evaluation has ``skip_corrupt``, or a mode is unknown.
    """
    check_modes(modes)
    _check_skipping(cfg, modes)
    folders, missing = [], []
    for mode in MODES:
        for dataset in find_datasets(cfg, [mode], is_timm_dataset) if mode in modes else []:
            if _is_folder(dataset):
                folders.append(_look(dataset, mode))
            elif _is_missing(dataset):
                missing.append(_root(dataset))
    if missing or any(folder.problem for folder in folders):
        raise FileNotFoundError(_explain(cfg, list(dict.fromkeys(missing)), folders))
    folders = [folder for folder in folders if folder.is_known]
    _check_same_classes(folders)
    _check_num_classes(cfg, folders)
    _check_input_size(cfg, modes)


@dataclass(frozen=True)
class _Folder:
    """The folder of one split, as far as it has been looked at."""

    mode: str  # what the runner uses it for
    root: str  # data_root of the dataset
    path: str  # the folder or tar file that is read, or should be there
    problem: str | None = None  # a key of PROBLEMS
    num_loose: int = 0  # images beside the class folders
    classes: tuple[str, ...] = ()  # class folders that have an image, in timm's order
    is_known: bool = False  # whether that is all; not with tar files, or folders inside class folders
    class_map: dict[str, int] | None = None

    @property
    def labels(self) -> dict[str, int]:
        """Label of each class folder."""
        if self.class_map is None:
            return {name: label for label, name in enumerate(self.classes)}
        return {name: self.class_map[name] for name in self.classes if name in self.class_map}


# What to say of a folder, and in the drawing of the tree.
PROBLEMS = {
    "missing": ("is missing", "missing"),
    "empty": ("has no class folders with images", "without class folders"),
    "flat": ("has {} images beside class folders instead of inside them", "without class folders"),
    "tiny-imagenet": ("is as the archive of Tiny-ImageNet extracts: 'images' would be a class", "to be converted"),
}


# Looking at folders


def _root(dataset: dict) -> str:
    return str(dataset.get("data_root") or "")


def _is_folder(dataset: dict) -> bool:
    """Whether it is an image folder, or tar files in a folder."""
    root = _root(dataset)
    return bool(root) and not dataset.get("name") and "://" not in root and not root.endswith(".tar")


def _is_missing(dataset: dict) -> bool:
    """Whether a tar file or a folder of torchvision is not there, of a dataset that is no image folder."""
    root, name = _root(dataset), (dataset.get("name") or "").lower()
    if not root or "://" in root:
        return False
    return not osp.exists(root) and (not name or (name.startswith("torch/") and not dataset.get("download")))


def _look(dataset: dict, mode: str) -> _Folder:
    root, split = osp.normpath(_root(dataset)), dataset.get("split", "train")
    try:
        path = str(find_split(root, split))
    except FileNotFoundError:
        return _Folder(mode, root, osp.join(root, split), "missing")
    if osp.isfile(path):
        return _Folder(mode, root, path)
    input_key = dataset.get("input_key")  # timm's option for other file extensions
    extensions = set(input_key.split(";")) if input_key else get_img_extensions(as_set=True)

    def is_image(entry: os.DirEntry) -> bool:
        return osp.splitext(entry.name)[1].lower() in extensions

    classes, nested, num_loose, has_tar = [], [], 0, False
    with os.scandir(path) as entries:
        for entry in entries:
            if not entry.is_dir():
                num_loose += is_image(entry)
                has_tar |= entry.name.endswith(".tar")
            elif _any_entry(entry.path, is_image):
                classes.append(entry.name)
            elif _any_entry(entry.path, os.DirEntry.is_dir):
                nested.append(entry.path)
    class_map = read_class_map(dataset.get("class_map"), path)
    problem = None
    if any(osp.isdir(osp.join(folder, "images")) for folder in nested) or (
        "images" in classes and osp.isfile(osp.join(path, "val_annotations.txt"))
    ):
        problem = "tiny-imagenet"
    elif num_loose and (class_map is None or not classes):
        problem = "flat"
    elif not classes and not nested and not has_tar:
        problem = "empty"
    classes = tuple(sorted(classes, key=natural_key))
    return _Folder(mode, root, path, problem, num_loose, classes, bool(classes) and not nested, class_map)


def _any_entry(folder: str, matches: Callable[[os.DirEntry], bool]) -> bool:
    with os.scandir(folder) as entries:
        return any(map(matches, entries))


# Whether data and model fit


def _check_skipping(cfg: Config, modes: Sequence[str]) -> None:
    """Raise a ValueError if an evaluation would count the image after a corrupt one twice."""
    for mode in (mode for mode in modes if mode != "train"):
        if any(dataset.get("skip_corrupt") for dataset in find_datasets(cfg, [mode], is_timm_dataset)):
            raise UserError(
                f"{mode}_dataloader.dataset.skip_corrupt=True would count the image after a corrupt one twice: leave "
                "it out (it is for training only), and replace or remove images that cannot be decoded"
            )


def _check_same_classes(folders: list[_Folder]) -> None:
    """Raise a ValueError if a class folder would get another label in another dataset."""
    for other in folders[1:]:
        first = folders[0]
        if first.labels == other.labels or (first.class_map is not None and other.class_map is not None):
            continue
        problem = f"{first.path} has {len(first.labels)} classes, {other.path} has {len(other.labels)}"
        for here, there in ((first, other), (other, first)):
            if only := here.labels.keys() - there.labels.keys():
                problem += f"; only {here.path} has {_some(only)}"
        if first.labels.keys() == other.labels.keys():
            problem += "; only one of them has a class_map, and it numbers them differently"
        raise UserError(f"{problem}. Make the class folders the same, or give both datasets a class_map")


def _check_num_classes(cfg: Config, folders: list[_Folder]) -> None:
    """Raise a ValueError if the head of the classifier has another number of classes than the data."""
    model = cfg.get("model") or {}
    if not is_type(model, "ImageClassifier") or "num_classes" not in model:
        return
    for folder in folders:
        number = len(folder.classes)
        if folder.class_map is not None:
            number = 1 + max(folder.class_map.values(), default=-1)
            if folder.mode != "train" and number < model["num_classes"]:
                continue  # some of the classes are enough to evaluate
        if number != model["num_classes"]:
            raise UserError(
                f"{folder.path} has {number} classes, but model.num_classes={model['num_classes']}: "
                f"set model.num_classes={number}, or data_root to the data that the model is for"
            )


def _check_input_size(cfg: Config, modes: Sequence[str]) -> None:
    """Raise a ValueError if images are smaller than the largest token of the backbone."""
    transforms = [
        transform
        for dataset in find_datasets(cfg, modes, is_timm_dataset)
        for transform in dataset.get("pipeline") or ()
        if isinstance(transform, dict) and is_type(transform, "TimmTransform")
    ]
    smallest = _largest_token((cfg.get("model") or {}).get("backbone") or {}) if transforms else 0
    for transform in transforms:
        size = transform.get("input_size", 224)
        if min(size if isinstance(size, Sequence) else [size]) < smallest:
            raise UserError(
                f"input_size={size} of the TimmTransform is too small for the backbone: a token of its last stage "
                f"covers {smallest} x {smallest} pixels. Set input_size to {smallest} or more, or take a smaller "
                "patch_size or fewer stages"
            )


def _largest_token(backbone: dict) -> int:
    """Return the pixels along the largest token of a backbone; 0 for one that is not ours."""
    from mmbivit.models.backbone import Backbone  # not at the top: mmbivit.models needs mmdet, data does not
    from mmbivit.registry import MODELS

    kind = backbone.get("type")
    kind = MODELS.get(kind) if isinstance(kind, str) else kind
    if not (isinstance(kind, type) and issubclass(kind, Backbone)):
        return 0
    with torch.device("meta"):  # neither memory nor random numbers
        network = MODELS.build(backbone | dict(type=kind))
    return max(block.stride for block in network.blocks())


def _some(names: set[str]) -> str:
    shown = sorted(names, key=natural_key)[:SHOWN_CLASSES]
    more = len(names) - len(shown)
    return ", ".join(map(repr, shown)) + (f" and {more} more" if more else "")


# The message


def _explain(cfg: Config, missing: list[str], folders: list[_Folder]) -> str:
    wrong = list({folder.path: folder for folder in folders if folder.problem}.values())
    lines = ["The data of this config is incomplete:", *(f"  {root} is missing" for root in missing)]
    for folder in wrong:
        lines.append(f"  {osp.join(folder.path, '')} {PROBLEMS[folder.problem][0].format(folder.num_loose)}")
    if folders:
        lines += ["", f"Expected (relative to {os.getcwd()}):"]
    for root in dict.fromkeys(folder.root for folder in folders):
        notes = {}
        for folder in (folder for folder in folders if folder.root == root):
            split = osp.relpath(folder.path, root)
            if osp.isfile(folder.path):
                notes[split] = ""
                continue
            notes[osp.join(split, "")] = PROBLEMS[folder.problem][1] if folder.problem else ""
            notes[osp.join(split, "<class>", "<image>.JPEG, .jpg or .png")] = ""
        lines += draw_tree(root, notes)
    return "\n".join([*lines, "", "What to do:", *_advise(cfg, missing, wrong)])


def _advise(cfg: Config, missing: list[str], wrong: list[_Folder]) -> list[str]:
    absent = [folder.root for folder in wrong if folder.problem in ("missing", "empty")]
    lines = []
    for root in dict.fromkeys([*missing, *absent]):
        lines += advise_data_root(root)
    commands = [f"{CONVERTER} {folder.root}" for folder in wrong if folder.problem == "tiny-imagenet"]
    if cfg.get("data_hint") and not commands:  # it has the folder of the config, not that of --data-root
        commands.append(cfg["data_hint"])
    for command in dict.fromkeys(commands):
        lines += ["  - Make or convert the data:", f"    {command}"]
    for folder in wrong:
        if folder.problem == "flat":
            lines += [
                f"  - Move the images into class folders, {osp.join(folder.path, '<class>', '')}. ImageNet's official",
                "    validation archive has none: timm, torchvision and the official PyTorch script valprep.sh expect",
                "    its images in folders named by wnid, as in train.",
            ]
    is_imagenet = not cfg.get("data_hint") or (cfg.get("model") or {}).get("num_classes") == 1000
    for root in dict.fromkeys(absent) if is_imagenet else []:
        lines += [
            "  - ImageNet: extract the official archives into",
            f"    {osp.join(root, 'train', '<wnid>', '')} and {osp.join(root, 'val', '<wnid>', '')}",
        ]
    return lines
