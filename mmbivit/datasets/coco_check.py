"""Finds out before a run whether its COCO data is there and can be used, and says what to do if it is not.

Without it the user meets a ``FileNotFoundError`` of one annotation file after the model has been built, or of one
image in a worker process.
"""

from __future__ import annotations

import os
import os.path as osp
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from mmengine.config import Config
from mmengine.utils import is_abs

from mmbivit.checks import UserError

from .annotation_check import CocoUse, check_annotations
from .digit_scenes import LAYOUTS

MODES = ("train", "val", "test")


def check_coco_data(cfg: Config, modes: Sequence[str] = MODES) -> list[str]:
    """Check that the annotation files and images of a config's COCO-like datasets exist and fit config and model.

    COCO-like is every dataset with a ``.json`` annotation file, also inside wrappers (``RepeatDataset``,
    ``ConcatDataset``, ...); the annotation files of the evaluators are checked as well. Data on remote storage
    (``s3://...``, or ``backend_args`` other than local) is not. The annotations are read for ``CocoDataset`` and
    ``CocoMetric`` only, see :func:`mmbivit.datasets.annotation_check.check_annotations`.

    Args:
        cfg: Config of a runner.
        modes: Which of ``train``, ``val`` and ``test`` to check.

    Returns:
        One line per data set or evaluator that leaves images or annotations out, to be logged.

    Raises:
        FileNotFoundError: Something is missing. The message has all of it, the expected tree, and what to do.
        ValueError: A mode is unknown, or an annotation file is malformed or does not fit; the message names it.
    """
    check_modes(modes)
    datasets = [dataset for dataset in find_datasets(cfg, modes, _is_coco) if _is_local(dataset)]
    expected: dict[str, bool] = {}  # path -> is it a folder; a dict keeps the order and drops repetitions
    for dataset in datasets:
        expected[_join(dataset, dataset["ann_file"])] = False
        for prefix in _prefixes(dataset).values():
            expected[_join(dataset, prefix)] = True
    for evaluator in _evaluators(cfg, modes):
        if _is_local(evaluator):
            expected[osp.normpath(evaluator["ann_file"])] = False
    missing = [path for path, is_folder in expected.items() if not (osp.isdir if is_folder else osp.isfile)(path)]
    if missing:
        roots = list(dict.fromkeys(osp.normpath(dataset["data_root"]) for dataset in datasets if _has_root(dataset)))
        raise FileNotFoundError(_explain(expected, missing, roots))
    return check_annotations(cfg, list(_uses(cfg, modes)))


def _uses(cfg: Config, modes: Sequence[str]) -> Iterator[CocoUse]:
    for mode in modes:
        for dataset in filter(_is_local, find_datasets(cfg, [mode], _is_coco)):
            folder = _join(dataset, _prefixes(dataset).get("img", ""))
            yield CocoUse(f"{mode}_dataloader", _join(dataset, dataset["ann_file"]), dataset, folder)
        for evaluator in filter(_is_local, _evaluators(cfg, [mode])):
            yield CocoUse(f"{mode}_evaluator", osp.normpath(evaluator["ann_file"]), evaluator)


def set_data_root(cfg: Config, data_root: str) -> None:
    """Point every COCO-like dataset and every :class:`mmbivit.TimmDataset` of ``cfg`` to ``data_root``, in place.

    ``--cfg-options data_root=...`` does not: each dataset has a ``data_root`` of its own, and the evaluators have it
    as the beginning of their ``ann_file``.

    Args:
        cfg: Config of a runner.
        data_root: The new folder; all datasets get the same.

    Raises:
        ValueError: No dataset has a ``data_root`` that could be changed.
    """
    datasets = [dataset for dataset in find_datasets(cfg, MODES, _is_coco) if _has_root(dataset)]
    image_datasets = find_datasets(cfg, MODES, is_timm_dataset)
    if not datasets and not image_datasets:
        raise UserError(
            "the config has no TimmDataset and no COCO-like dataset with a data_root, so there is nothing to point "
            "elsewhere: change the ann_file and data_prefix of its datasets"
        )
    old_roots = {osp.normpath(dataset["data_root"]) for dataset in [*datasets, *image_datasets] if _has_root(dataset)}
    for dataset in image_datasets:
        class_map = dataset.get("class_map")
        inner = below(class_map, old_roots) if isinstance(class_map, str) else None
        if inner is not None:
            dataset["class_map"] = osp.join(data_root, inner)
        dataset["data_root"] = data_root
    for dataset in datasets:
        # Paths that repeat the old root would still lead there.
        dataset["ann_file"] = below(dataset["ann_file"], old_roots) or dataset["ann_file"]
        for key, prefix in _prefixes(dataset).items():
            dataset["data_prefix"][key] = below(prefix, old_roots) or prefix
        dataset["data_root"] = data_root
    for evaluator in _evaluators(cfg, MODES):
        inner = below(evaluator["ann_file"], old_roots)
        if inner is not None:
            evaluator["ann_file"] = osp.join(data_root, inner)
    if "data_root" in cfg:
        cfg.data_root = data_root


# Reading configs


def check_modes(modes: Iterable[str]) -> None:
    """Raise a ValueError if one of ``modes`` is not a mode of a runner."""
    unknown = set(modes) - set(MODES)
    if unknown:
        raise UserError(f"modes must be among {', '.join(MODES)}, got {', '.join(sorted(unknown))}")


def find_datasets(cfg: Config, modes: Iterable[str], matches: Callable[[dict], bool]) -> list[dict]:
    """The dataset configs of some modes, inside wrappers of any depth, each once (val and test often share one)."""
    found = (leaf for mode in modes for leaf in _leaves((cfg.get(f"{mode}_dataloader") or {}).get("dataset"), matches))
    return list({id(leaf): leaf for leaf in found}.values())


def is_type(config: dict, name: str) -> bool:
    """Whether ``config`` builds our class ``name``: ``'X'``, ``'mmbivit.X'`` or the class itself."""
    type_ = config.get("type")
    return getattr(type_, "__name__", type_) in (name, f"mmbivit.{name}")


def is_timm_dataset(config: dict) -> bool:
    """Whether ``config`` is that of a :class:`mmbivit.TimmDataset`."""
    return is_type(config, "TimmDataset")


def _evaluators(cfg: Config, modes: Iterable[str]) -> list[dict]:
    """The evaluator configs with a ``.json`` annotation file, each once."""
    found = (leaf for mode in modes for leaf in _leaves(cfg.get(f"{mode}_evaluator"), _is_coco))
    return list({id(leaf): leaf for leaf in found}.values())


def _is_coco(config: dict) -> bool:
    return isinstance(config.get("ann_file"), str) and config["ann_file"].endswith(".json")


def _leaves(node: Any, matches: Callable[[dict], bool]) -> Iterator[dict]:
    """Configs that match, inside wrappers of any depth."""
    if isinstance(node, (list, tuple)):
        for item in node:
            yield from _leaves(item, matches)
    elif isinstance(node, dict):
        if matches(node):
            yield node
        for key in ("dataset", "datasets", "metrics"):
            yield from _leaves(node.get(key), matches)


def _has_root(dataset: dict) -> bool:
    return bool(dataset.get("data_root"))


def _prefixes(dataset: dict) -> dict[str, str]:
    return {key: prefix for key, prefix in (dataset.get("data_prefix") or {}).items() if prefix}


def _is_local(item: dict) -> bool:
    backend_args = item.get("backend_args") or {"backend": "local"}
    paths = [item.get("data_root") or "", item["ann_file"], *_prefixes(item).values()]
    return backend_args.get("backend") == "local" and not any("://" in path for path in paths)


def _join(dataset: dict, path: str) -> str:
    """Join as MMEngine's ``BaseDataset`` does."""
    return osp.normpath(path if is_abs(path) else osp.join(dataset.get("data_root") or "", path))


def below(path: str, roots: Iterable[str]) -> str | None:
    """``path`` relative to the innermost of ``roots`` that it begins with, or None."""
    for root in sorted(roots, key=len, reverse=True):
        if osp.normpath(path).startswith(osp.join(root, "")):
            return osp.relpath(path, root)
    return None


# The message


def _explain(expected: dict[str, bool], missing: list[str], roots: list[str]) -> str:
    lines = ["The data of this config is incomplete. Missing:"]
    lines += [f"  {path}{os.sep if expected[path] else ''}" for path in missing]
    lines += ["", f"Expected (relative to {os.getcwd()}):"]
    stray = [path for path in expected if below(path, roots) is None]
    for root in [*roots, *dict.fromkeys(osp.dirname(path) for path in stray)]:
        inside = {below(path, [root]): path for path in expected if below(path, [root])}
        notes = {
            relative + (os.sep if expected[path] else ""): "missing" if path in missing else ""
            for relative, path in inside.items()
        }
        lines += draw_tree(root, notes)
    lines += ["", "What to do:"]
    if len(roots) != 1:
        lines.append("  - correct data_root, ann_file and data_prefix of the datasets, and ann_file of the evaluators.")
        return "\n".join(lines)
    (root,) = roots
    lines += advise_data_root(root)
    is_free = not osp.lexists(root) or (osp.isdir(root) and not os.listdir(root))
    layout = _find_layout(below(path, [root]) for path, is_folder in expected.items() if not is_folder)
    if layout is not None:
        out = root if is_free else f"{root}_demo"
        option = "" if layout == "digit_scenes" else f"--layout {layout} "
        lines.append(
            "  - You have no data: make small demo data of the same layout, in seconds and without a download:"
        )
        lines.append(f"    python tools/make_digit_scenes.py {option}--out {out}")
        if not is_free:
            lines.append(f"    and pass --data-root {out} to tools/train.py or tools/test.py")
    return "\n".join(lines)


def _find_layout(ann_files: Iterable[str | None]) -> str | None:
    """The demo layout that has all of these annotation files, if there is one."""
    names = set(ann_files)
    for layout, splits in LAYOUTS.items():
        if names <= {ann_file for _, ann_file in splits.values()}:
            return layout
    return None


def advise_data_root(root: str) -> list[str]:
    """Lines that say what to do if the data is elsewhere."""
    lines = ["  - The data is in another folder: pass it to tools/train.py or tools/test.py as --data-root DIR"]
    if not osp.lexists(root):
        lines = [f"{lines[0]},", f"    or link it: ln -s DIR {root}"]
    return lines


def draw_tree(root: str, notes: dict[str, str]) -> list[str]:
    """Lines of a folder tree.

    Args:
        root: The folder on top.
        notes: What to say beside each path, or ``''``. Paths are relative to ``root``; folders end with a separator.
    """
    return [f"  {osp.join(root, '')}", *(f"  {line}" for line in _draw_branches(notes))]


def _draw_branches(notes: dict[str, str]) -> list[str]:
    children: dict[str, dict[str, str]] = {}
    for path, note in sorted(notes.items()):
        name, separator, rest = path.partition(os.sep)
        inside = children.setdefault(name + separator, {})
        if rest:
            inside[rest] = note
    lines = []
    for position, (name, inside) in enumerate(children.items()):
        is_last = position == len(children) - 1
        note = notes.get(name)
        lines.append(f"{'└── ' if is_last else '├── '}{name}{f'  <- {note}' if note else ''}")
        lines += [f"{'    ' if is_last else '│   '}{line}" for line in _draw_branches(inside)]
    return lines
