import copy
import random

import numpy as np
import pytest
import torch
from mmengine.registry import MODELS as ROOT_MODELS
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from mmbivit.models import ClassificationPreprocessor

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
AS_IS = dict(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def random_batch(size=4, classes=5):
    inputs = torch.randint(0, 256, (size, 3, 16, 12), dtype=torch.uint8)
    labels = torch.randint(0, classes, (size,))
    return dict(inputs=inputs, labels=labels, img_path=[f"{i}.png" for i in range(size)])


def constant_batch(*values):
    """Images of one value each, float, the i-th of class i."""
    inputs = torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 3, 32, 32)
    return dict(inputs=inputs, labels=torch.arange(len(values)))


@pytest.mark.parametrize("training", [False, True])
def test_normalises_with_the_formula(training):
    batch = random_batch()
    before = copy.deepcopy(batch)
    out = ClassificationPreprocessor(MEAN, STD)(batch, training)

    expected = batch["inputs"].numpy().astype(np.float64) / 255
    expected = (expected - np.reshape(MEAN, (1, 3, 1, 1))) / np.reshape(STD, (1, 3, 1, 1))
    # float32 has 24 bits, and values reach 3.5
    torch.testing.assert_close(out["inputs"].double(), torch.from_numpy(expected), rtol=0, atol=1e-6)
    assert out["inputs"].dtype == torch.float32
    assert list(out) == ["inputs", "labels", "img_path"]
    assert torch.equal(out["labels"], before["labels"])
    assert out["img_path"] == before["img_path"]


def test_floats_are_pixels_in_0_to_1():
    batch = random_batch()
    preprocessor = ClassificationPreprocessor()
    as_float = dict(inputs=batch["inputs"].double() / 255)
    torch.testing.assert_close(preprocessor(as_float)["inputs"], preprocessor(batch)["inputs"], rtol=0, atol=1e-6)
    assert list(preprocessor(as_float)) == ["inputs"]  # labels are not needed to predict
    assert preprocessor.mean.flatten().tolist() == pytest.approx(IMAGENET_DEFAULT_MEAN)
    assert preprocessor.std.flatten().tolist() == pytest.approx(IMAGENET_DEFAULT_STD)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_leaves_the_batch_alone(dtype):
    batch = random_batch()
    batch["inputs"] = batch["inputs"].to(dtype)
    before = copy.deepcopy(batch)
    preprocessor = ClassificationPreprocessor(
        **AS_IS, mixup=dict(prob=1.0), num_classes=5, random_erasing=dict(probability=1.0, mode="pixel")
    )
    out = preprocessor(batch, training=True)
    assert out["labels"].shape == (4, 5)
    assert torch.equal(batch["inputs"], before["inputs"])
    assert torch.equal(batch["labels"], before["labels"])


def test_is_built_from_a_config_and_adds_nothing_to_checkpoints():
    preprocessor = ROOT_MODELS.build(dict(type="mmbivit.ClassificationPreprocessor", mean=MEAN, std=STD))
    assert isinstance(preprocessor, ClassificationPreprocessor)
    assert preprocessor.state_dict() == {}


def test_mixup_weighs_pixels_and_smoothed_labels():
    batch = random_batch(classes=4)
    preprocessor = ClassificationPreprocessor(**AS_IS, mixup=dict(mixup_alpha=0.8), num_classes=4, label_smoothing=0.1)
    np.random.seed(3)
    assert np.random.rand() < 1.0  # timm draws whether to mix, then how much
    share = np.random.beta(0.8, 0.8)
    np.random.seed(3)
    out = preprocessor(batch, training=True)

    pixels = batch["inputs"].double() / 255
    expected = share * pixels + (1 - share) * pixels.flip(0)
    torch.testing.assert_close(out["inputs"].double(), expected, rtol=0, atol=1e-6)
    # smoothing 0.1 over 4 classes: 0.1 / 4 for all, 0.9 more for the right one
    smooth = torch.full((4, 4), 0.025, dtype=torch.float64)
    smooth[torch.arange(4), batch["labels"]] += 0.9
    torch.testing.assert_close(out["labels"].double(), share * smooth + (1 - share) * smooth.flip(0), rtol=0, atol=1e-6)
    torch.testing.assert_close(out["labels"].sum(dim=1), torch.ones(4))


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_shares_of_pixels_are_shares_of_labels(mode, kind):
    """Image i has the value 2 ** i, so that a mixed image says what it is made of."""
    alphas = dict(mixup_alpha=float(kind == "mixup"), cutmix_alpha=float(kind == "cutmix"))
    preprocessor = ClassificationPreprocessor(**AS_IS, mixup=dict(mode=mode, **alphas), num_classes=4)
    out = preprocessor(constant_batch(1.0, 2.0, 4.0, 8.0), training=True)

    torch.testing.assert_close(out["labels"].sum(dim=1), torch.ones(4))
    values = torch.tensor([1.0, 2.0, 4.0, 8.0])
    torch.testing.assert_close(out["inputs"].mean(dim=(1, 2, 3)), out["labels"] @ values, rtol=1e-5, atol=0)
    partner = [3, 2, 1, 0]
    for i, image in enumerate(out["inputs"]):
        assert set(out["labels"][i].nonzero().flatten().tolist()) <= {i, partner[i]}
        if kind == "cutmix":
            assert set(image.unique().tolist()) <= {values[i].item(), values[partner[i]].item()}
            rows, columns = torch.nonzero(image[0] == values[partner[i]], as_tuple=True)
            if len(rows):  # one rectangle
                assert len(rows) == (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
    assert any(0 < share < 1 for share in out["labels"].flatten().tolist())


def test_random_erasing_only_in_training():
    preprocessor = ClassificationPreprocessor(MEAN, STD, random_erasing=dict(probability=1.0, mode="const"))
    batch = dict(inputs=torch.full((8, 3, 32, 32), 255, dtype=torch.uint8), labels=torch.arange(8))
    whole = (1 - torch.tensor(MEAN)) / torch.tensor(STD)
    out = preprocessor(batch, training=True)
    assert torch.equal(out["labels"], torch.arange(8))
    for image in out["inputs"]:
        erased = (image == 0).all(dim=0)
        assert 0.01 < erased.float().mean() < 0.36  # timm erases 2 % to a third, in whole pixels
        kept = image[:, ~erased]
        torch.testing.assert_close(kept, whole[:, None].expand_as(kept))
    assert (preprocessor(batch)["inputs"] != 0).all()


def test_random_pixels_are_drawn_on_the_device_of_the_batch():
    preprocessor = ClassificationPreprocessor(random_erasing=dict(probability=1.0, mode="pixel")).to("meta")
    out = preprocessor(random_batch(), training=True)
    assert out["inputs"].device.type == "meta"
    assert preprocessor.random_erasing.device.type == "meta"


def test_erases_before_it_mixes():
    """As in DeiT: a mixed image may hold half of a pixel and half of what was erased."""
    preprocessor = ClassificationPreprocessor(
        **AS_IS, mixup=dict(mixup_alpha=1.0), num_classes=2, random_erasing=dict(probability=1.0, mode="const")
    )
    random.seed(0)
    out = preprocessor(constant_batch(1.0, 1.0), training=True)
    share = out["labels"][0, 0].item()
    values = out["inputs"][0].unique()
    assert len(values) >= 3
    for value in values.tolist():
        assert min(abs(value - known) for known in (0, share, 1 - share, 1)) < 1e-6


def test_refuses_odd_batches_only_where_it_mixes():
    preprocessor = ClassificationPreprocessor(mixup={}, num_classes=5)
    with pytest.raises(ValueError, match="batch has 3.*even batch_size, and drop_last=True"):
        preprocessor(random_batch(3), training=True)
    assert preprocessor(random_batch(3))["labels"].shape == (3,)


def test_refuses_batches_that_are_not_stacked():
    batch = random_batch()
    batch["inputs"] = list(batch["inputs"])
    with pytest.raises(ValueError, match="default_collate"):
        ClassificationPreprocessor()(batch)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(mean=(123.7, 116.3, 103.5), std=(58.4, 57.1, 57.4)), "pixels in 0..1"),
        (dict(mean=(0.5,), std=MEAN), "one of each per colour"),
        (dict(std=(0.2, 0.0, 0.2)), r"std\[1\].*=0.0"),
        (dict(mixup=dict(mixup_alpha=0.8)), "needs num_classes"),
        (dict(mixup=dict(alpha=0.8), num_classes=5), "mixup has no key 'alpha'; allowed: mixup_alpha, cutmix_alpha"),
        (dict(mixup=dict(num_classes=5), num_classes=5), "no key 'num_classes'"),
        (dict(mixup=dict(mode="half"), num_classes=5), "'batch', 'pair', 'elem'"),
        (dict(mixup=dict(mixup_alpha=0.0), num_classes=5), "mixes nothing"),
        (dict(label_smoothing=0.1), "label_smoothing of the classifier"),
        (dict(random_erasing=dict(re_prob=0.25)), "no key 're_prob'; allowed: probability"),
        (dict(random_erasing=dict(device="cpu")), "no key 'device'"),
        (dict(random_erasing=dict(mode="pixels")), "'const', 'rand', 'pixel'"),
    ],
)
def test_refuses_impossible_settings(options, message):
    with pytest.raises(ValueError, match=message):
        ClassificationPreprocessor(**options)
