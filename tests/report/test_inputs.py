"""Models, images and batches that analyses start from, against pixels computed by hand."""

import copy

import cv2
import numpy as np
import pytest
import torch
from mmengine.registry import MODELS
from PIL import Image

from mmbivit.apis.config import load_config
from mmbivit.models import BinarySwinTransformer
from mmbivit.report.inputs import load_images, load_stage2_model, load_teacher, pixels_of, training_batches
from tests.packed_files import trained

IMAGENET = [[123.675, 116.28, 103.53], [58.395, 57.12, 57.375]]  # mean and standard deviation of RGB, 0 to 255


@pytest.fixture(scope="module")
def float_detector(configs, tmp_path_factory):
    """A float detector, and its checkpoint."""
    path = tmp_path_factory.mktemp("float_detector") / "float.pth"
    return trained(configs["float"], path, ("person",), "mmdet"), path


def save(pixels, path):
    Image.fromarray(pixels).save(path)
    return path


def random_pixels(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def normalise(rgb):
    mean, std = torch.tensor(IMAGENET)[..., None, None]
    return (torch.tensor(rgb).permute(2, 0, 1) - mean) / std


@pytest.mark.parametrize("kind", ["detector", "classifier"])
def test_model_of_stage_2(kind, request, configs, classifier_configs):
    model, checkpoint = request.getfixturevalue(kind)
    cfg, loaded = load_stage2_model((configs if kind == "detector" else classifier_configs)["binary"], checkpoint)
    expected = model.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in loaded.state_dict().items())
    assert loaded.backbone.stage == 2
    assert not any(module.training for module in loaded.modules())
    assert cfg.model.backbone.recipe == "sibivit"


def test_stage_1_is_refused(configs, detector, tmp_path):
    model = copy.deepcopy(detector[0])
    model.backbone.set_stage(1)
    torch.save(dict(state_dict=model.state_dict()), tmp_path / "stage1.pth")
    with pytest.raises(ValueError) as error:
        load_stage2_model(configs["binary"], tmp_path / "stage1.pth")
    assert str(error.value) == (
        f"{tmp_path / 'stage1.pth'} is of training stage 1, where the network is not all binary; "
        "give a checkpoint of stage 2"
    )


def test_packed_file_and_missing_files_are_refused(configs, detector, detector_file, tmp_path):
    with pytest.raises(ValueError, match="is a packed file"):
        load_stage2_model(configs["binary"], detector_file)
    with pytest.raises(FileNotFoundError, match="nothing.pth does not exist"):
        load_stage2_model(configs["binary"], tmp_path / "nothing.pth")
    with pytest.raises(FileNotFoundError, match="nothing.py does not exist"):
        load_stage2_model(tmp_path / "nothing.py", detector[1])


def test_data_root(configs, detector, coco, tmp_path):
    (tmp_path / "coco").symlink_to(coco)
    cfg, _ = load_stage2_model(configs["binary"], detector[1], data_root=str(tmp_path / "coco"))
    assert str(tmp_path / "coco") in cfg.train_dataloader.dataset.data_root


def test_images_of_a_detector(configs, detector, tmp_path):
    model, _ = detector
    cfg = load_config(configs["binary"])
    whole, small = random_pixels(64, 64), random_pixels(20, 32)
    files = [save(whole, tmp_path / "a.png"), save(small, tmp_path / "b.png")]
    (first_file, first), (second_file, second) = load_images(cfg, model, [tmp_path])
    assert [first_file, second_file] == files
    torch.testing.assert_close(first, normalise(whole)[None])
    # Resized to 64 x 40 with its ratio kept, then padded to a multiple of 32 with the mean, which is 0.
    resized = cv2.resize(small, (64, 40), interpolation=cv2.INTER_LINEAR)
    assert second.shape == (1, 3, 64, 64)
    torch.testing.assert_close(second[0, :, :40], normalise(resized))
    assert not second[0, :, 40:].any()
    np.testing.assert_array_equal(pixels_of(model, first), whole)
    mean = np.broadcast_to(np.round(IMAGENET[0]).astype(np.uint8), (24, 64, 3))
    np.testing.assert_array_equal(pixels_of(model, second), np.concatenate([resized, mean]))


def test_images_of_a_classifier(classifier_configs, classifier, tmp_path):
    model, _ = classifier
    file = save(random_pixels(50, 60), tmp_path / "a.png")
    ((found, image),) = load_images(load_config(classifier_configs["binary"]), model, [file])
    assert found == file
    # timm's default: the shorter side to 32 / 0.875, then the centre.
    resized = np.asarray(Image.open(file).resize((43, 36), Image.BILINEAR))[2:34, 6:38]
    torch.testing.assert_close(image, normalise(resized)[None])
    np.testing.assert_array_equal(pixels_of(model, image), resized)


@pytest.mark.parametrize(
    "options, seen",
    [
        (dict(mean=IMAGENET[0], std=IMAGENET[1]), lambda rgb: normalise(rgb[..., ::-1].copy())),
        ({}, lambda rgb: torch.tensor(rgb[..., ::-1].copy()).permute(2, 0, 1).float()),
        (dict(bgr_to_rgb=True), lambda rgb: torch.tensor(rgb).permute(2, 0, 1).float()),
    ],
)
def test_pixels_of_other_preprocessors_of_mmdet(configs, detector, tmp_path, options, seen):
    model = copy.deepcopy(detector[0])
    model.data_preprocessor = MODELS.build(dict(type="mmdet.DetDataPreprocessor", **options))
    pixels = random_pixels(64, 64)
    save(pixels, tmp_path / "a.png")
    ((_, image),) = load_images(load_config(configs["binary"]), model, [tmp_path / "a.png"])
    torch.testing.assert_close(image[0].float(), seen(pixels))
    np.testing.assert_array_equal(pixels_of(model, image), pixels)


@pytest.mark.parametrize("kind", ["detector", "classifier"])
def test_broken_and_missing_images(kind, request, configs, classifier_configs, tmp_path):
    model, _ = request.getfixturevalue(kind)
    cfg = load_config((configs if kind == "detector" else classifier_configs)["binary"])
    broken = save(random_pixels(64, 64), tmp_path / "broken.png")
    broken.write_bytes(broken.read_bytes()[:100])
    with pytest.raises(ValueError, match="broken.png"):
        list(load_images(cfg, model, [broken]))
    with pytest.raises(FileNotFoundError, match="missing.png does not exist"):
        list(load_images(cfg, model, [tmp_path / "missing.png"]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty has no image"):
        list(load_images(cfg, model, [tmp_path / "empty"]))


@pytest.mark.parametrize("key", ["test_dataloader", "pipeline"])
def test_config_without_transforms(configs, detector, images, key):
    cfg = load_config(configs["binary"])
    cfg.val_dataloader = None
    if key == "test_dataloader":
        cfg.test_dataloader = None
    else:
        del cfg.test_dataloader.dataset.pipeline
    with pytest.raises(ValueError, match="tiny_binary.py has no test_dataloader with a pipeline"):
        next(load_images(cfg, detector[0], images))


def test_teacher_of_the_config(configs, float_detector, monkeypatch):
    model, checkpoint = float_detector
    monkeypatch.setenv("MMBIVIT_FLOAT_CHECKPOINT", str(checkpoint))
    teacher = load_teacher(load_config(configs["binary"]))
    expected = model.backbone.state_dict()
    assert isinstance(teacher, BinarySwinTransformer) and not teacher.training
    assert teacher.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in teacher.state_dict().items())


@pytest.mark.parametrize("whole", [True, False])
def test_teacher_with_other_weights(configs, float_detector, tmp_path, whole):
    model, checkpoint = float_detector
    if not whole:
        checkpoint = tmp_path / "backbone.pth"
        torch.save(model.backbone.state_dict(), checkpoint)
    cfg = load_config(configs["binary"])
    before = copy.deepcopy(cfg.custom_hooks)
    teacher = load_teacher(cfg, checkpoint)
    name = "stages.1.blocks.0.attn.qkv.weight"
    assert torch.equal(teacher.state_dict()[name], model.backbone.state_dict()[name])
    assert cfg.custom_hooks == before


def test_teacher_of_mmdet(configs, tmp_path):
    teacher_cfg = dict(type="SwinTransformer", embed_dims=8, depths=(1, 1), num_heads=(1, 2), strides=(4, 2))
    teacher_cfg["out_indices"] = (0, 1)
    theirs = MODELS.build(teacher_cfg | dict(type="mmdet.SwinTransformer"))
    torch.save(dict(state_dict=theirs.state_dict()), tmp_path / "theirs.pth")
    cfg = load_config(configs["binary"])
    cfg.custom_hooks[0].teacher = dict(**teacher_cfg, init_cfg=dict(checkpoint="unused"))
    teacher = load_teacher(cfg, tmp_path / "theirs.pth")
    assert type(teacher) is type(theirs) and not teacher.training
    assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in teacher.state_dict().items())


def test_no_teacher(configs, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="tiny_finetune.py has no teacher to compare with.*--teacher-checkpoint"):
        load_teacher(load_config(configs["finetune"]), tmp_path / "any.pth")
    monkeypatch.setenv("MMBIVIT_FLOAT_CHECKPOINT", "no/float.pth")
    cfg = load_config(configs["binary"])
    with pytest.raises(FileNotFoundError) as error:
        load_teacher(cfg)
    expected = "the teacher's checkpoint no/float.pth does not exist; give its weights with --teacher-checkpoint FILE"
    assert str(error.value) == expected
    with pytest.raises(FileNotFoundError, match="the teacher's checkpoint .*any.pth does not exist"):
        load_teacher(cfg, tmp_path / "any.pth")


def test_training_batches(classifier_configs, classifier, image_folders):
    cfg = load_config(classifier_configs["binary"])
    cfg.model.data_preprocessor = None
    model = copy.deepcopy(classifier[0])
    model.data_preprocessor = MODELS.build(dict(type="mmbivit.ClassificationPreprocessor"))
    batches = list(training_batches(cfg, model, 2, seed=3))
    assert [batch["inputs"].shape for batch in batches] == [(6, 3, 32, 32)] * 2
    # Each image is one of the data set's, with the label of its folder, and none comes twice.
    known = {}
    for label, folder in enumerate(sorted((image_folders / "train").iterdir())):
        for file in folder.iterdir():
            pixels = np.asarray(Image.open(file).resize((36, 36), Image.BILINEAR))[2:34, 2:34]
            known[pixels.tobytes()] = (label, file)
    seen = []
    for batch in batches:
        for image, label in zip(batch["inputs"], batch["labels"], strict=True):
            expected, file = known[pixels_of(model, image[None]).tobytes()]
            assert int(label) == expected
            seen.append(file)
    assert len(set(seen)) == 12
    again, other = (list(training_batches(cfg, model, 2, seed=seed)) for seed in (3, 4))
    assert all(torch.equal(a["inputs"], b["inputs"]) for a, b in zip(batches, again, strict=True))
    assert not all(torch.equal(a["inputs"], b["inputs"]) for a, b in zip(batches, other, strict=True))
    with pytest.raises(ValueError, match="^4 batches are wanted, but an epoch of the training data has 3$"):
        next(training_batches(cfg, model, 4))
