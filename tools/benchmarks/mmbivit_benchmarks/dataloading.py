"""Measures how fast images are loaded, by our data loader and by timm's, and how fast training consumes them."""

import copy
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS
from mmengine.runner import Runner
from PIL import Image
from timm.data import ImageDataset, create_loader

from mmbivit.checks import check_integer
from mmbivit.datasets.scene_rendering import crop_photo
from mmbivit.datasets.timm_transform import tolerate_zero_bits
from mmbivit.distill import Distiller
from mmbivit.engine.decoupled_training_hook import build_terms

__all__ = ["make_images", "markdown_table", "measure_loaders", "measure_steps"]

IMAGE_SIZE = (375, 500)  # height, width: what most images of ImageNet have
JPEG_QUALITY = 98  # 85 kB a file, near ImageNet's 110 kB: the time to decode depends on bytes, too
NAMES = {"ours": "mmbivit: TimmDataset + ClassificationPreprocessor", "timm": "timm: create_loader"}


def make_images(root: Path, count: int, classes: int = 8) -> int:
    """Write JPEG crops of photographs that wheels bring along, as ``root/train/<class>/<number>.jpg``.

    Returns:
        The mean size of a file, in bytes.
    """
    check_integer("--images", count, 1)
    rng = np.random.default_rng(0)
    sizes = []
    for i in range(count):
        path = root / "train" / f"class_{i % classes}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels, _, _ = crop_photo(rng, "train", list(IMAGE_SIZE))
        Image.fromarray(pixels).save(path, quality=JPEG_QUALITY)
        sizes.append(path.stat().st_size)
    return round(statistics.mean(sizes))


def our_loader(cfg: Config, root: Path, batch_size: int, workers: int) -> Callable[[], Iterable]:
    """Build the training data loader of a config as the runner does; call the result for an epoch of ready batches."""
    loader_cfg = copy.deepcopy(cfg.train_dataloader)
    loader_cfg.update(
        batch_size=batch_size, num_workers=workers, persistent_workers=workers > 0, pin_memory=False, drop_last=True
    )
    loader_cfg.dataset.data_root = str(root)
    loader = Runner.build_dataloader(loader_cfg, seed=0)
    preprocessor = MODELS.build({**cfg.model.data_preprocessor, "mixup": None})
    return lambda: (preprocessor(batch, training=True) for batch in loader)


def timm_loader(cfg: Config, root: Path, batch_size: int, workers: int) -> Callable[[], Iterable]:
    """Build timm's data loader with the augmentation of the config.

    Without a GPU, too, its PrefetchLoader normalises and erases batches in the main process, as our preprocessor does.
    """
    transform = {**cfg.train_dataloader.dataset.pipeline[0]}
    transform.pop("type")
    preprocessor = cfg.model.data_preprocessor
    erasing = preprocessor.random_erasing
    dataset = ImageDataset(str(root / "train"))
    loader = create_loader(
        dataset,
        batch_size=batch_size,
        **transform,
        re_prob=erasing.probability,
        re_mode=erasing.mode,
        mean=preprocessor.mean,
        std=preprocessor.std,
        num_workers=workers,
        device=torch.device("cpu"),
    )
    tolerate_zero_bits(dataset.transform)
    return lambda: loader


def measure_loaders(cfg: Config, root: Path, batch_size: int, workers: int, repeats: int) -> dict[str, list[float]]:
    """Time whole epochs of both loaders, in turn, in one process.

    The first epoch of each is not counted: it starts the worker processes, which stay, and fills the file cache.

    Args:
        cfg: config of a classifier, for its training data and its preprocessor, without Mixup.
        root: folder of :func:`make_images`.
        batch_size: images per batch; the last, smaller batch is dropped.
        workers: worker processes of each loader.
        repeats: epochs that are counted.

    Returns:
        Images per second of every epoch, for ``ours`` and ``timm``.
    """
    loaders = {
        "ours": our_loader(cfg, root, batch_size, workers),
        "timm": timm_loader(cfg, root, batch_size, workers),
    }
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    for repeat in range(repeats + 1):
        # The one that starts changes: what slows the machine down for a while hits both.
        for name in sorted(loaders, reverse=repeat % 2 == 1):
            start = time.perf_counter()
            batches = sum(1 for _ in loaders[name]())
            if not batches:
                raise ValueError(f"batch_size={batch_size} is more than there are images: make more of them")
            if repeat:
                rates[name].append(batches * batch_size / (time.perf_counter() - start))
    return rates


def measure_steps(cfg: Config, batch_size: int, steps: int) -> dict[str, list[float]]:
    """Time training steps of both stages on batches that are in memory already; the first step is not counted.

    Weights are random, the teacher's too: that does not change the time.

    Returns:
        Images per second of every step, for ``stage 1`` (with the teacher) and ``stage 2``.
    """
    model: BaseModel = MODELS.build(cfg.model)
    model.train()
    optim_wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    size = cfg.train_dataloader.dataset.pipeline[0].input_size
    batch = dict(
        inputs=torch.randint(0, 256, (batch_size, 3, size, size), dtype=torch.uint8),
        labels=torch.randint(0, cfg.model.num_classes, (batch_size,)),
    )
    rates: dict[str, list[float]] = {}
    for stage in (1, 2):
        model.backbone.set_stage(stage)
        distiller = _distiller(cfg, model) if stage == 1 else None
        rates[f"stage {stage}"] = times = []
        for step in range(steps + 1):
            start = time.perf_counter()
            model.train_step(batch, optim_wrapper)
            if step:
                times.append(batch_size / (time.perf_counter() - start))
        if distiller is not None:
            distiller.remove()
    return rates


def _distiller(cfg: Config, model: BaseModel) -> Distiller:
    hook = next(hook for hook in cfg.custom_hooks if hook.type == "mmbivit.DecoupledTrainingHook")
    teacher = MODELS.build({key: value for key, value in hook.teacher.items() if key != "init_cfg"})
    return Distiller(model, model.backbone, teacher, build_terms(hook.get("distill_loss"), hook.distill_weight))


def markdown_table(loaders: dict[str, list[float]], steps: dict[str, list[float]]) -> str:
    """Format medians, ranges and what they say about each other as Markdown."""
    medians = {name: statistics.median(values) for name, values in {**loaders, **steps}.items()}
    lines = ["| what | images/s, median | lowest to highest |", "|---|---|---|"]
    for name, values in {**loaders, **steps}.items():
        title = NAMES.get(name, f"training step, {name}")
        lines.append(f"| {title} | {medians[name]:.1f} | {min(values):.1f} to {max(values):.1f} |")
    lines += ["", "| ratio of medians | |", "|---|---|"]
    lines.append(f"| our loader / timm's | {medians['ours'] / medians['timm']:.3f} |")
    lines += [f"| our loader / training step, {name} | {medians['ours'] / medians[name]:.2f} |" for name in steps]
    return "\n".join(lines)
