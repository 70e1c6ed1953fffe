"""How long the demo's detectors take for an image."""

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.dataset import pseudo_collate
from torch import nn

from mmbivit import config_path
from mmbivit.apis.checkpoints import load_trained_model
from mmbivit.apis.config import load_config
from mmbivit.apis.detection import detection_transform
from mmbivit.datasets import DigitScenes
from mmbivit.deploy import load
from mmbivit.engine.quiet import quiet

from .steps import DemoPlan

__all__ = ["Speed", "measure_speed", "times_in_turn"]

IMAGES = 16


@dataclass(frozen=True)
class Speed:
    """What was measured.

    Attributes:
        milliseconds: per image, by detector: ``float``, ``binary`` (simulated) and ``packed``.
        images: how many.
        threads: of each detector.
    """

    milliseconds: dict[str, float]
    images: int
    threads: int


@quiet()
def measure_speed(plan: DemoPlan, out: Path) -> Speed:
    """Time the demo's detectors on the CPU, from the decoded image to boxes and masks, one validation image at a time.

    Args:
        plan: what the demo did.
        out: its folder.
    """
    configs = dict(float=plan.float_config, binary=plan.binary_config)
    weights = dict(float=out / "float" / "last.pth", binary=out / "sibivit" / "last.pth")
    cfgs = {name: load_config(config_path(config)) for name, config in configs.items()}
    models = {name: load_trained_model(cfg, weights[name]).to("cpu") for name, cfg in cfgs.items()}
    models["packed"] = load(out / "sibivit.safetensors")
    transform = detection_transform(cfgs["binary"])
    scenes = sorted(DigitScenes.load(out / "data").image_dir("val").iterdir())[:IMAGES]
    inputs = [pseudo_collate([transform(dict(img_path=str(scene), img_id=0))]) for scene in scenes]
    return Speed(times_in_turn(models, inputs), len(inputs), torch.get_num_threads())


@torch.no_grad()
def times_in_turn(models: Mapping[str, nn.Module], inputs: list[Any]) -> dict[str, float]:
    """Return the median time per input of each model in milliseconds.

    All take their turn at each input, so that whatever else the machine does meets all of them. The first input is a
    warm-up, which comes again and counts then.
    """
    times: dict[str, list[float]] = {name: [] for name in models}
    for item in [inputs[0], *inputs]:
        for name, model in models.items():
            start = time.perf_counter()
            model.test_step(item)
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values[1:]) for name, values in times.items()}
