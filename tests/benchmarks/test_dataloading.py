import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmbivit import get_config
from mmbivit_benchmarks.dataloading import (
    make_images,
    markdown_table,
    measure_loaders,
    measure_steps,
    our_loader,
    timm_loader,
)

TINY = dict(embed_dims=8, depths=(1, 1), num_heads=(1, 2))


@pytest.fixture
def cfg():
    """The shipped config with images of 32 x 32 pixels and a tiny network."""
    cfg = get_config("classification/sibivit_swin_t_imagenet")
    cfg.train_dataloader.dataset.pipeline[0].input_size = 32
    cfg.model.num_classes = 8
    for backbone in (cfg.model.backbone, cfg.custom_hooks[0].teacher.backbone):
        backbone.update(arch=TINY, out_indices=(1,))
    return cfg


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("images")
    size = make_images(root, 10)
    files = sorted(root.rglob("*.jpg"))
    assert len(files) == 10
    assert size == round(sum(file.stat().st_size for file in files) / 10)
    assert len(list((root / "train").iterdir())) == 8
    assert Image.open(files[0]).size == (500, 375)
    return root


def first_batch(loader):
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    return next(iter(loader()))


def test_compares_like_with_like(cfg, images, monkeypatch):
    """Both loaders make the same batch from the same images in the same order."""
    cfg.train_dataloader.sampler.shuffle = False
    monkeypatch.setattr("torch.utils.data.RandomSampler.__iter__", lambda self: iter(range(10)))
    ours = first_batch(our_loader(cfg, images, 4, 0))
    inputs, labels = first_batch(timm_loader(cfg, images, 4, 0))
    assert torch.equal(ours["labels"], labels)
    torch.testing.assert_close(ours["inputs"], inputs, rtol=0, atol=1e-6)


def test_measures_loaders(cfg, images):
    rates = measure_loaders(cfg, images, batch_size=4, workers=0, repeats=2)
    assert {name: len(values) for name, values in rates.items()} == {"ours": 2, "timm": 2}
    assert min(min(values) for values in rates.values()) > 0
    with pytest.raises(ValueError, match="--images=0"):
        make_images(images, 0)
    with pytest.raises(ValueError, match="batch_size=16 is more than there are images"):
        measure_loaders(cfg, images, batch_size=16, workers=0, repeats=1)


def test_measures_steps(cfg):
    rates = measure_steps(cfg, batch_size=2, steps=2)
    assert {name: len(values) for name, values in rates.items()} == {"stage 1": 2, "stage 2": 2}


def test_table():
    loaders = {"ours": [90.0, 110.0, 100.0], "timm": [80.0, 79.0, 90.0]}
    assert markdown_table(loaders, {"stage 1": [10.0], "stage 2": [20.0, 25.0]}).splitlines() == [
        "| what | images/s, median | lowest to highest |",
        "|---|---|---|",
        "| mmbivit: TimmDataset + ClassificationPreprocessor | 100.0 | 90.0 to 110.0 |",
        "| timm: create_loader | 80.0 | 79.0 to 90.0 |",
        "| training step, stage 1 | 10.0 | 10.0 to 10.0 |",
        "| training step, stage 2 | 22.5 | 20.0 to 25.0 |",
        "",
        "| ratio of medians | |",
        "|---|---|",
        "| our loader / timm's | 1.250 |",
        "| our loader / training step, stage 1 | 10.00 |",
        "| our loader / training step, stage 2 | 4.44 |",
    ]
