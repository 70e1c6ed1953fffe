"""What the analysis of a trained network starts from: its model, images as it sees them, batches as it trains on."""

import copy
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from torch import Tensor, nn

from mmbivit.apis.checkpoints import load_trained_model
from mmbivit.apis.classification import classification_transform, load_image
from mmbivit.apis.config import is_classifier, load_config
from mmbivit.apis.detection import detection_transform
from mmbivit.apis.images import check_is_image, find_images
from mmbivit.apis.route import refuse_packed_file
from mmbivit.checks import UserError
from mmbivit.datasets import set_data_root
from mmbivit.engine.decoupled_training_hook import build_teacher, find_staged_backbone
from mmbivit.models import ImageClassifier

__all__ = ["load_images", "load_stage2_model", "load_teacher", "pixels_of", "training_batches"]


def load_stage2_model(
    config: str | Path, checkpoint: str | Path, data_root: str | None = None
) -> tuple[Config, nn.Module]:
    """Load a config and its model with the weights of a checkpoint from the last stage, in evaluation mode.

    Args:
        config: the config file of a detector or classifier with a binary backbone.
        checkpoint: file or URL of the weights.
        data_root: folder of the data set, as in ``tools/train.py``.

    Raises:
        FileNotFoundError: if a file does not exist.
        ValueError: if the backbone has no stages, or the checkpoint is packed, of an earlier stage or of another model.
    """
    refuse_packed_file(checkpoint)
    cfg = load_config(config)
    if data_root is not None:
        set_data_root(cfg, data_root)
    model = load_trained_model(cfg, checkpoint)
    backbone = find_staged_backbone(model)
    if backbone.stage != backbone.last_stage:
        raise UserError(
            f"{checkpoint} is of training stage {backbone.stage}, where the network is not all binary; "
            f"give a checkpoint of stage {backbone.last_stage}"
        )
    return cfg, model


def load_teacher(cfg: Config, checkpoint: str | Path | None = None) -> nn.Module:
    """Build the float backbone that a config's ``DecoupledTrainingHook`` distils from, in evaluation mode.

    Args:
        cfg: the config of a detector or classifier.
        checkpoint: file or URL of its weights, of a backbone or of what has it as ``backbone``; by default what the
            config names.

    Raises:
        FileNotFoundError: if the weights are not there.
        ValueError: if the config has no teacher, or the weights do not fit it.
    """
    teachers = [hook["teacher"] for hook in cfg.get("custom_hooks") or () if hook.get("teacher")]
    if not teachers:
        raise UserError(
            f"{cfg.filename} has no teacher to compare with: --teacher-checkpoint gives the weights of "
            "custom_hooks=[dict(type='mmbivit.DecoupledTrainingHook', teacher=dict(type=..., init_cfg=...), ...)]"
        )
    teacher = copy.deepcopy(teachers[0])
    if checkpoint is not None:
        refuse_packed_file(checkpoint)
        teacher["init_cfg"] = dict(type="Pretrained", checkpoint=str(checkpoint))
    try:
        with DefaultScope.overwrite_default_scope(cfg.get("default_scope") or "mmengine"):
            network = build_teacher(teacher)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"the teacher's {error}; give its weights with --teacher-checkpoint FILE") from error
    network.eval()  # not chained: mmdet's Swin returns None
    return network


def load_images(cfg: Config, model: nn.Module, images: list[str | Path]) -> Iterator[tuple[Path, Tensor]]:
    """Load images with the transforms of the config's test data, one at a time.

    Args:
        cfg: the config of a detector or classifier.
        model: its model, whose data preprocessor normalises.
        images: files, folders and glob patterns.

    Yields:
        The file, and the image ``(1, 3, H, W)`` as the backbone gets it, on the model's device.

    Raises:
        FileNotFoundError: if an image does not exist.
        ValueError: if an image cannot be read, or the config has no transforms.
    """
    files = find_images(images, unique_names=False)
    with DefaultScope.overwrite_default_scope(cfg.get("default_scope") or "mmengine"):
        transform = classification_transform(cfg) if is_classifier(cfg) else detection_transform(cfg)
    for file in files:
        check_is_image(file)
        if is_classifier(cfg):
            data = dict(inputs=load_image(file, transform)[None])
        else:
            item = transform(dict(img_path=str(file), img_id=0))
            data = dict(inputs=[item["inputs"]], data_samples=[item["data_samples"]])
        yield file, model.data_preprocessor(data)["inputs"]


def pixels_of(model: nn.Module, image: Tensor) -> np.ndarray:
    """Undo the normalisation of a model's data preprocessor: ``(1, 3, H, W)`` -> RGB ``(H, W, 3)`` of uint8."""
    preprocessor = model.data_preprocessor
    scale = 255 if isinstance(model, ImageClassifier) else 1  # which has mean and std of pixels in 0..1
    pixels = image[0]
    if hasattr(preprocessor, "mean"):  # mmdet's may leave pixels as they are
        pixels = (pixels * preprocessor.std + preprocessor.mean) * scale
    if not getattr(preprocessor, "_channel_conversion", True):
        pixels = pixels.flip(0)  # mmdet reads BGR, and this network takes it
    return pixels.clamp(0, 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()


def training_batches(cfg: Config, model: nn.Module, count: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Draw batches of the config's training data, augmented and normalised as in training.

    Args:
        cfg: the config of a detector or classifier.
        model: its model, whose data preprocessor normalises.
        count: number of batches.
        seed: of the sampler.

    Yields:
        What ``model(**batch, mode='loss')`` takes.

    Raises:
        ValueError: if an epoch of the training data has fewer batches.
    """
    loader_cfg = dict(cfg.train_dataloader, num_workers=0, persistent_workers=False)
    loader_cfg.pop("prefetch_factor", None)
    with DefaultScope.overwrite_default_scope(cfg.get("default_scope") or "mmengine"):
        loader = Runner.build_dataloader(loader_cfg, seed=seed)
        if len(loader) < count:
            raise UserError(f"{count} batches are wanted, but an epoch of the training data has {len(loader)}")
        for data in islice(loader, count):
            yield model.data_preprocessor(data, training=True)
