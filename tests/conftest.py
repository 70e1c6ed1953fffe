"""What all tests share: the import order, fixed random numbers, threads, a tiny data set with its configs."""

import gc
import os
import random
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import config, utils
from yapf.yapflib import yapf_api

import mmbivit  # noqa: F401  before any test imports mmdet: it stands in for mmcv's compiled operators
from mmbivit.apis import export_packed, train, train_config
from tests.packed_files import trained
from tests.tiny import CLASSES, CLASSIFIER_CONFIGS, make_coco, make_image_folders, write_configs

# Two threads; one each where two processes of pytest share the cores, and in what those start.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))

# Most of the time of a tiny run: MMEngine formats its config five times, and reads the hundred files of mmdet's index
# for each of the config's bases. Here, each text is formatted and each file read once.
_formatted: dict[str, tuple[str, bool]] = {}


def _format_once(text: str, format_code=yapf_api.FormatCode, **style: object) -> tuple[str, bool]:
    if text not in _formatted:
        _formatted[text] = format_code(text, **style)
    return _formatted[text]


yapf_api.FormatCode = config.FormatCode = _format_once  # the second in OpenMMLab's MMEngine
utils.load = cache(utils.load)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the slow tests: where processes share the tests, none is left with them at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish() -> None:
    """Leave what was imported out of garbage collections, of which MMEngine makes one with each data set."""
    gc.collect()
    gc.freeze()


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


@pytest.fixture(scope="session")
def image_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders of 32 x 32 images."""
    return make_image_folders(tmp_path_factory.mktemp("data") / "image_folders")


@pytest.fixture(scope="session")
def classifier_configs(tmp_path_factory: pytest.TempPathFactory, image_folders: Path) -> dict[str, Path]:
    """Tiny configs of classifiers by name: ``float``, ``binary``."""
    return write_configs(tmp_path_factory.mktemp("classifier_configs"), image_folders, CLASSIFIER_CONFIGS)


@pytest.fixture(scope="session")
def float_classifier(tmp_path_factory: pytest.TempPathFactory, classifier_configs: dict[str, Path]) -> Path:
    """The checkpoint of two epochs of the float classifier."""
    work_dir = tmp_path_factory.mktemp("float_classifier")
    options = {"experiment_name": "float_classifier"}
    train(train_config(classifier_configs["float"], work_dir=str(work_dir), seed=0, cfg_options=options))
    return work_dir / "epoch_2.pth"


def train_two_stages(config: Path, float_checkpoint: Path, work_dir: Path) -> Path:
    """Train a tiny binary network for an epoch in each stage, and return its work dir."""
    torch.manual_seed(0)
    cfg = train_config(config, work_dir=str(work_dir), seed=0, float_checkpoint=str(float_checkpoint))
    cfg.custom_hooks.append(dict(type="mmbivit.SignFlipsHook"))
    cfg.experiment_name = work_dir.name
    train(cfg)
    return work_dir


@pytest.fixture(scope="session")
def two_stage_run(tmp_path_factory: pytest.TempPathFactory, configs: dict[str, Path], float_checkpoint: Path) -> Path:
    """The work dir of a detector that was trained for an epoch in each stage, with its sign flips logged."""
    work_dir = tmp_path_factory.mktemp("run") / "two_stage_run"
    return train_two_stages(configs["binary"], float_checkpoint, work_dir)


@pytest.fixture(scope="module")
def detector(configs, tmp_path_factory) -> tuple[torch.nn.Module, Path]:
    """A detector with a binary backbone, and its checkpoint."""
    path = tmp_path_factory.mktemp("detector") / "detector.pth"
    return trained(configs["binary"], path, ("person",), "mmdet"), path


@pytest.fixture(scope="module")
def classifier(classifier_configs, tmp_path_factory) -> tuple[torch.nn.Module, Path]:
    """A classifier with a binary backbone, and its checkpoint."""
    path = tmp_path_factory.mktemp("classifier") / "classifier.pth"
    return trained(classifier_configs["binary"], path, CLASSES, "mmengine"), path


@pytest.fixture(scope="module")
def detector_file(configs, detector) -> Path:
    """The packed file of the detector."""
    path = detector[1].with_name("detector.safetensors")
    export_packed(configs["binary"], detector[1], path)
    return path


@pytest.fixture(scope="module")
def classifier_file(classifier_configs, classifier) -> Path:
    """The packed file of the classifier."""
    path = classifier[1].with_name("classifier.safetensors")
    export_packed(classifier_configs["binary"], classifier[1], path)
    return path


@pytest.fixture
def images(coco) -> list[Path]:
    """The validation images."""
    return sorted((coco / "val2017").iterdir())
