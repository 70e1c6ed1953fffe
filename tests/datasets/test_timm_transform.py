"""timm's transforms against timm itself, Pillow and arithmetic."""

import itertools
import pickle
import random

import numpy as np
import pytest
import torch
from mmengine.dataset import Compose
from PIL import Image
from timm.data import create_transform

from mmbivit.datasets import TimmTransform


def photo(size=(100, 60)):
    # smooth, so that a wrong interpolation or a shift of a pixel shows
    x, y = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]))
    return Image.fromarray((np.stack([x, y, np.sin(20 * x * y) / 2 + 0.5], axis=-1) * 255).astype(np.uint8))


def test_eval_resizes_and_crops_the_centre():
    out = TimmTransform(32, interpolation="bicubic", crop_pct=0.875)(dict(img=photo()))["inputs"]
    # 32 / 0.875 = 36.57: the shorter side becomes 36, the other 36 * 100 / 60 = 60; 14 and 2 pixels are cut off
    resized = photo().resize((60, 36), Image.Resampling.BICUBIC)
    expected = np.asarray(resized.crop((14, 2, 46, 34))).transpose(2, 0, 1)
    assert out.dtype == torch.uint8
    assert np.array_equal(out.numpy(), expected)


@pytest.mark.parametrize(
    "options",
    [
        dict(auto_augment="rand-m9-mstd0.5-inc1", interpolation="bicubic"),
        dict(color_jitter=0.3, scale=[0.5, 1.0], ratio=[1.0, 1.0], hflip=0.0, vflip=0.5),
        dict(no_aug=True),
        dict(train_crop_mode="rkrc", auto_augment="original", interpolation="random"),
    ],
)
@pytest.mark.parametrize("size", [32, (24, 40)])
def test_training_equals_timm(options, size):
    ours = pickle.loads(pickle.dumps(TimmTransform(size, is_training=True, **options)))  # as to a spawned worker
    theirs = create_transform(size, True, use_prefetcher=True, **options)
    outputs = []
    for transform in (lambda image: ours(dict(img=image))["inputs"], theirs):
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        outputs.append([torch.as_tensor(transform(photo())) for _ in range(5)])
    assert all(one.dtype == torch.uint8 and torch.equal(one, other) for one, other in zip(*outputs, strict=True))
    assert outputs[0][0].shape == (3, *((size, size) if isinstance(size, int) else size))


@pytest.mark.parametrize("policy", ["rand-m10-mstd0-inc1", "augmix-m10", "originalr"])
def test_posterize_may_keep_no_bits(policy):
    """Pillow 13 refuses 0 bits, which RandAugment draws once in 660 images; black is what earlier versions made."""
    transform = TimmTransform(32, is_training=True, auto_augment=policy)
    step = next(step for step in transform.transform.transforms if hasattr(step, "ops") or hasattr(step, "policy"))
    for operation in itertools.chain.from_iterable(getattr(step, "policy", None) or [step.ops]):
        if operation.name.startswith("Posterize"):
            break
    operation.prob, operation.magnitude, operation.magnitude_std = 1.0, 10, 0
    assert operation.name == "PosterizeIncreasing"  # 10 of 10: from 4 down to 0 bits
    assert np.asarray(operation(photo())).max() == 0
    operation.magnitude = 5  # 2 bits: 0, 64, 128, 192
    assert np.array_equal(np.asarray(operation(photo())), np.asarray(photo()) // 64 * 64)


def test_the_transform_keeps_other_results():
    results = Compose([dict(type="mmbivit.TimmTransform", input_size=16)])(
        dict(img=photo(), labels=3, img_path="a.png")
    )
    assert results["labels"] == 3
    assert results["inputs"].shape == (3, 16, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(input_size=0), "positive integer, or"),
        (dict(input_size=(3, 32, 32)), "positive integer, or"),
        (dict(input_size="32"), "positive integer, or"),
        (dict(input_size=True), "positive integer, or"),
        (dict(re_prob=0.25), "random_erasing=.* of the data_preprocessor"),
        (dict(mean=(0.5, 0.5, 0.5)), "mean and std of the model's data_preprocessor"),
        (dict(std=(0.5, 0.5, 0.5)), "mean and std of the model's data_preprocessor"),
        (dict(normalize=False), "data_preprocessor"),
        (dict(use_prefetcher=True), "always one uint8 image"),
        (dict(separate=True), "always one uint8 image"),
        (dict(patchify=True), "always one uint8 image"),
        (dict(flip=0.5), "flip of TimmTransform is unknown to timm; allowed: crop_border_pixels, crop_mode, crop_pct"),
        (dict(auto_augment="rand-m9"), "no effect with is_training=False"),
        (dict(is_training=True, crop_pct=0.9), "no effect with is_training=True; allowed: auto_augment"),
        (dict(interpolation="cubic"), "does not take .*cubic"),
        (dict(is_training=True, train_crop_mode="centre"), "does not take .*centre"),
    ],
)
def test_refuses_options_of_transforms(options, message):
    with pytest.raises(ValueError, match=message):
        TimmTransform(**options)
