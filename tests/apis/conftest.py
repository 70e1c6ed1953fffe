"""Packed files of a tiny detector and a tiny classifier."""

from pathlib import Path

import pytest
import torch

from mmbivit.apis import (
    export_packed,
)
from tests.apis.packed_files import trained
from tests.tiny import CLASSES


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
    return sorted((coco / "val2017").iterdir())
