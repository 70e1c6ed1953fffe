"""What all tests share: the import order, fixed random numbers, two threads, a tiny data set with its configs."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

import mmbivit  # noqa: F401  before any test imports mmdet: it stands in for mmcv's compiled operators
from mmbivit.apis import train, train_config
from tests.tiny import make_coco, write_configs

if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Start every test from the same random numbers."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A COCO folder of 64 x 64 images."""
    return make_coco(tmp_path_factory.mktemp("data") / "coco")


@pytest.fixture(scope="session")
def configs(tmp_path_factory: pytest.TempPathFactory, coco: Path) -> dict[str, Path]:
    """Tiny configs by name: ``float``, ``binary``, ``finetune``."""
    return write_configs(tmp_path_factory.mktemp("configs"), coco)


@pytest.fixture(scope="session")
def float_checkpoint(tmp_path_factory: pytest.TempPathFactory, configs: dict[str, Path]) -> Path:
    """The checkpoint of one epoch of the float detector."""
    work_dir = tmp_path_factory.mktemp("float")
    options = {"train_cfg.max_epochs": 1, "experiment_name": "float_checkpoint"}
    train(train_config(configs["float"], work_dir=str(work_dir), seed=0, cfg_options=options))
    return work_dir / "epoch_1.pth"
