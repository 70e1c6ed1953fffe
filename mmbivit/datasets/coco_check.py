"""Finds out before a run whether its COCO data is there, and says what to do if it is not.

Without it the user meets a ``FileNotFoundError`` of one annotation file after the model has been built, or of one
image in a worker process.
"""

from __future__ import annotations

import os
import os.path as osp
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from mmengine.config import Config
from mmengine.utils import is_abs

from .digit_scenes import LAYOUTS

MODES = ("train", "val", "test")


def check_coco_data(cfg: Config, modes: Sequence[str] = MODES) -> None:
    """Check that the annotation files and image folders of a config's COCO-like datasets exist.

    COCO-like is every dataset with a ``.json`` annotation file, also inside wrappers (``RepeatDataset``,
    ``ConcatDataset``, ...); the annotation files of the evaluators are checked as well. Data on remote storage
    (``s3://...``, or ``backend_args`` other than local) is not.

    Args:
        cfg: Config of a runner.
        modes: Which of ``train``, ``val`` and ``test`` to check.

    Raises:
        FileNotFoundError: Something is missing. The message has all of it, the expected tree, and what to do.
        ValueError: A mode is unknown.
    """
    unknown = set(modes) - set(MODES)
    if unknown:
        raise ValueError(f"modes must be among {', '.join(MODES)}, got {', '.join(sorted(unknown))}")
    datasets = [dataset for dataset in _datasets(cfg, modes) if _is_local(dataset)]
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


def set_data_root(cfg: Config, data_root: str) -> None:
    """Point every COCO-like dataset of ``cfg`` to ``data_root``, in place.

    ``--cfg-options data_root=...`` does not: each dataset has a ``data_root`` of its own, and the evaluators have it
    as the beginning of their ``ann_file``.

    Args:
        cfg: Config of a runner.
        data_root: The new folder; all datasets get the same.

    Raises:
        ValueError: No dataset has a ``data_root`` that could be changed.
    """
    datasets = [dataset for dataset in _datasets(cfg, MODES) if _has_root(dataset)]
    if not datasets:
        raise ValueError(
            "the config has no COCO-like dataset with a data_root, so there is nothing to point elsewhere: "
            "change the ann_file and data_prefix of its datasets"
        )
    old_roots = {osp.normpath(dataset["data_root"]) for dataset in datasets}
    for dataset in datasets:
        # Paths that repeat the old root would still lead there.
        dataset["ann_file"] = _below(dataset["ann_file"], old_roots) or dataset["ann_file"]
        for key, prefix in _prefixes(dataset).items():
            dataset["data_prefix"][key] = _below(prefix, old_roots) or prefix
        dataset["data_root"] = data_root
    for evaluator in _evaluators(cfg, MODES):
        inner = _below(evaluator["ann_file"], old_roots)
        if inner is not None:
            evaluator["ann_file"] = osp.join(data_root, inner)
    if "data_root" in cfg:
        cfg.data_root = data_root


# Reading configs


def _datasets(cfg: Config, modes: Iterable[str]) -> list[dict]:
    """The COCO-like dataset configs of some modes, each once (val and test often share one)."""
    found = (leaf for mode in modes for leaf in _leaves((cfg.get(f"{mode}_dataloader") or {}).get("dataset")))
    return list({id(leaf): leaf for leaf in found}.values())


def _evaluators(cfg: Config, modes: Iterable[str]) -> list[dict]:
    """The evaluator configs with a ``.json`` annotation file, each once."""
    found = (leaf for mode in modes for leaf in _leaves(cfg.get(f"{mode}_evaluator")))
    return list({id(leaf): leaf for leaf in found}.values())


def _leaves(node: Any) -> Iterator[dict]:
    """Configs with a ``.json`` annotation file, inside wrappers of any depth."""
    if isinstance(node, (list, tuple)):
        for item in node:
            yield from _leaves(item)
    elif isinstance(node, dict):
        if isinstance(node.get("ann_file"), str) and node["ann_file"].endswith(".json"):
            yield node
        for key in ("dataset", "datasets", "metrics"):
            yield from _leaves(node.get(key))


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


def _below(path: str, roots: Iterable[str]) -> str | None:
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
    stray = [path for path in expected if _below(path, roots) is None]
    for root in [*roots, *dict.fromkeys(osp.dirname(path) for path in stray)]:
        inside = {_below(path, [root]): path for path in expected if _below(path, [root])}
        lines.append(f"  {osp.join(root, '')}")
        lines += [f"  {line}" for line in _draw_tree(inside, expected, missing)]
    lines += ["", "What to do:"]
    if len(roots) != 1:
        lines.append("  - correct data_root, ann_file and data_prefix of the datasets, and ann_file of the evaluators.")
        return "\n".join(lines)
    (root,) = roots
    lines.append("  - The data is in another folder: pass it to tools/train.py or tools/test.py as --data-root DIR")
    is_free = not osp.lexists(root) or (osp.isdir(root) and not os.listdir(root))
    if not osp.lexists(root):
        lines[-1] += f",\n    or link it: ln -s DIR {root}"
    layout = _find_layout(_below(path, [root]) for path, is_folder in expected.items() if not is_folder)
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


def _draw_tree(inside: dict[str, str], expected: dict[str, bool], missing: list[str]) -> list[str]:
    """Lines of a folder tree; ``inside`` maps paths relative to its root to the expected paths."""
    children: dict[str, dict[str, str]] = {}
    for relative, path in sorted(inside.items()):
        name, _, rest = relative.partition(os.sep)
        below = children.setdefault(name, {})
        if rest:
            below[rest] = path
    lines = []
    for position, (name, below) in enumerate(children.items()):
        is_last = position == len(children) - 1
        path = inside.get(name)
        is_folder = bool(below) or expected[path]
        note = "  <- missing" if path in missing else ""
        lines.append(f"{'└── ' if is_last else '├── '}{name}{os.sep if is_folder else ''}{note}")
        lines += [f"{'    ' if is_last else '│   '}{line}" for line in _draw_tree(below, expected, missing)]
    return lines
