"""Predictions for image files, of every kind of network."""

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import all_gather_object, get_rank, get_world_size
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

from mmbivit.checkpoints import use_safe_loading
from mmbivit.checks import UserError, check_integer, check_number
from mmbivit.deploy import load
from mmbivit.engine.allocator import keep_freed_memory
from mmbivit.engine.device import distributed
from mmbivit.engine.quiet import quiet
from mmbivit.engine.threads import share_threads
from mmbivit.files import check_writable

from .checkpoints import load_trained_model
from .classification import classify
from .config import load_config
from .detection import detect
from .errors import UnusableImagesError
from .images import MAX_PIXELS, find_images
from .route import Route, find_route, refuse_packed_file

__all__ = ["load_network", "predict", "print_predictions"]

SCORE_THR, TOPK = 0.3, 5
SECONDS_PER_WEEK = 7 * 24 * 3600


@quiet()
def predict(
    config: str | Path | None,
    checkpoint: str | Path,
    images: Sequence[str | Path],
    out_dir: str | Path | None = None,
    *,
    score_thr: float | None = None,
    topk: int | None = None,
    device: str | None = None,
    batch_size: int = 1,
    max_pixels: int = MAX_PIXELS,
    launcher: str = "none",
) -> list[dict[str, Any]]:
    """Detect objects in images, or classify them, with the transforms of the config's test data.

    Args:
        config: the config file; ``None`` for a packed file, which needs none and runs on the CPU.
        checkpoint: file or URL of the weights, or a packed file; for a float classifier also the name of a timm model.
        images: files, folders and glob patterns.
        out_dir: what is predicted goes to ``out_dir/preds``, one JSON file per image, and a detector's pictures to
            ``out_dir/vis``. A detector needs it, and its files have ``labels``, ``scores``, ``bboxes`` (x1, y1, x2, y2
            in pixels) and, from a mask head, ``masks`` (RLE); those of a classifier have what is returned.
        score_thr: for detectors, lowest score of a detection that is drawn, from 0 to 1, by default 0.3; the JSON has
            all.
        topk: for classifiers, classes per image, by default 5; all of them, if there are fewer.
        device: such as ``cuda:0``; the best available by default.
        batch_size: images per forward pass.
        max_pixels: an image of more pixels is not decoded.
        launcher: ``pytorch`` if torchrun has started several processes, which take a share of the images each; for
            packed files. What is returned and raised is that of all images, in each process. On several machines,
            each writes into its own ``out_dir`` unless they share it.

    Returns:
        For each image in their order a dict of ``img_path``, and of a detector ``json_file``, of a classifier
        ``labels``, ``scores`` (probabilities) and ``names``, best first. Names are those in the checkpoint, or the
        labels where it has none.

    Raises:
        FileNotFoundError: if config, checkpoint or an image does not exist.
        OSError: if nothing can be written into ``out_dir``, before anything is loaded.
        UnusableImagesError: after all others were predicted, if images cannot be read or have too many pixels.
        ValueError: if the checkpoint does not fit the config, or an option has no sense or is for the other kind.
    """
    _check_options(score_thr, topk, device, batch_size, max_pixels)
    if config is not None:
        refuse_packed_file(checkpoint)
    cfg = None if config is None else load_config(config)
    route = find_route(cfg, checkpoint)
    route.refuse_options(score_thr=score_thr, topk=topk)
    if route.kind == "detector" or out_dir is not None:
        _check_out_dir(out_dir)
    files = find_images(images, unique_names=out_dir is not None)
    batches = [files[start : start + batch_size] for start in range(0, len(files), batch_size)]
    with _processes(launcher, route, batches):
        if launcher != "none":
            share_threads()
            batches = batches[get_rank() :: get_world_size()]  # whole ones, as images of a batch share their size
        model, cfg = load_network(route, cfg, device)
        if route.kind == "detector":
            score_thr = SCORE_THR if score_thr is None else score_thr
            results, problems = detect(model, cfg, batches, out_dir, score_thr, max_pixels)  # type: ignore[arg-type]  # see _check_out_dir
        else:
            model.topk = min(TOPK if topk is None else topk, model.head.out_features)
            results, problems = classify(model, cfg, batches, out_dir, max_pixels)
        if launcher != "none":
            results, problems = _of_all_processes(files, results, problems)
    if problems:
        raise UnusableImagesError(results, problems)
    return results


def _processes(launcher: str, route: Route, batches: list[list[Path]]) -> AbstractContextManager[None]:
    """Make a context in which the processes of a launcher are connected, with the same images each.

    Raises:
        ValueError: for a launcher that cannot be; inside, if the processes differ.
    """
    if launcher not in ("none", "pytorch"):
        raise UserError(f"--launcher {launcher}; allowed: none, pytorch")
    if launcher != "none" and not route.packed:
        raise UserError(f"--launcher {launcher} is for packed files, and {route.checkpoint} is none")
    images = [[str(file) for file in batch] for batch in batches]
    # The first to end waits for the others, which may take long.
    connection = dict(backend="gloo", timeout=SECONDS_PER_WEEK)
    return distributed(Config(dict(launcher=launcher, images=images, env_cfg=dict(dist_cfg=connection))), "cpu")


def _of_all_processes(
    files: Sequence[Path], results: list[dict[str, Any]], problems: dict[Path, str]
) -> tuple[list[dict[str, Any]], dict[Path, str]]:
    """Return the results and the problems of all processes, in the order of the files."""
    place = {file: i for i, file in enumerate(files)}  # the folder may have another path on another machine
    mine = {place[Path(result["img_path"])]: result for result in results}
    found: dict[int, dict[str, Any]] = {}
    wrong: dict[int, str] = {}
    for share in all_gather_object((mine, {place[file]: line for file, line in problems.items()})):
        found |= share[0]
        wrong |= share[1]
    return [found[i] for i in sorted(found)], {files[i]: wrong[i] for i in sorted(wrong)}


def _check_options(
    score_thr: float | None, topk: int | None, device: str | None, batch_size: int, max_pixels: int
) -> None:
    """Raise a ValueError for numbers without sense, or a device that cannot be used here."""
    for name, number in (("batch-size", batch_size), ("max-pixels", max_pixels), ("topk", topk)):
        if number is not None:
            check_integer(f"--{name}", number, 1)
    if score_thr is not None:
        check_number("--score-thr", score_thr, 0, 1)
    if not device:
        return
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {device}: PyTorch finds no CUDA device here; leave the option out, or take cpu")
    try:
        torch.zeros(1, device=device).cpu()
    except Exception as error:  # unknown, not there or without data as "meta"; each kind raises its own errors
        raise UserError(
            f"--device {device} cannot be used here; leave the option out, or take one such as cpu or cuda:0"
        ) from error


def _check_out_dir(out_dir: str | Path | None) -> None:
    """Raise a ValueError if there is no folder for what is predicted, an OSError if it cannot be written into."""
    if out_dir is None:
        raise UserError("--out-dir DIR is needed: pictures and detections are written there")
    check_writable("--out-dir", out_dir, folder=True)


def load_network(route: Route, cfg: Config | None, device: str | None) -> tuple[nn.Module, Config]:
    """Load a network, with a config of its transforms of test images and its visualizer.

    Args:
        route: its way, see :func:`mmbivit.apis.route.find_route`.
        cfg: its config; unused for a packed file.
        device: such as ``cuda:0``; the best available by default.
    """
    if not route.packed:
        use_safe_loading()
        return load_trained_model(cfg, route.checkpoint).to(device or get_device()), cfg
    if device not in (None, "cpu"):
        raise UserError(f"--device {device}: {route.checkpoint} is packed, which runs on the CPU")
    keep_freed_memory()
    model = load(route.checkpoint)
    if not model.cfg.test_dataloader:
        raise UserError(
            f"{route.checkpoint} has no transforms of test images; export it with a config that has a test_dataloader"
        )
    visualizer = dict(type="DetLocalVisualizer", name="packed")
    return model, Config(dict(test_dataloader=model.cfg.test_dataloader, visualizer=visualizer))


def print_predictions(results: Sequence[dict[str, Any]], out_dir: str | Path | None) -> None:
    """Print what :func:`predict` returns: the most likely classes, and where files were written."""
    if results and "json_file" in results[0]:
        print(f"Wrote {len(results)} pictures to {out_dir}/vis and their detections to {out_dir}/preds.")
    elif results:
        # A pipe or a file has no width: nothing is cut there.
        Console(width=None if sys.stdout.isatty() else 10_000).print(_table(results))
        if out_dir is not None:
            print(f"Wrote the classes of {len(results)} images to {out_dir}/preds.")


def _table(results: Sequence[dict[str, Any]]) -> Table:
    """Make a table of what :func:`predict` returns, a row for each class of each image of a classifier."""
    table = Table("image", "rank", "class", "%")
    for column, justify in zip(table.columns, ("left", "right", "left", "right"), strict=True):
        column.justify, column.overflow = justify, "fold"  # type: ignore[assignment]  # rich's literals
    for result in results:
        for rank, (name, score) in enumerate(zip(result["names"], result["scores"], strict=True), start=1):
            table.add_row(Text(result["img_path"]), str(rank), Text(name), f"{100 * score:.2f}")
    return table
