"""What all tests share: the import order, fixed random numbers, two threads."""

import os
import random

import numpy as np
import pytest
import torch

import mmbivit  # noqa: F401  before any test imports mmdet: it stands in for mmcv's compiled operators

if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Start every test from the same random numbers."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
