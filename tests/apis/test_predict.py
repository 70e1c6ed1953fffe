"""Predictions for image files: what all networks have in common, and detections."""

import json
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle

from mmbivit.apis import UnusableImagesError, predict
from mmbivit.apis.images import find_images, load_usable
from tests.apis.damaged_images import USABLE, check_problems, write_images


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two images of different size, a text file and one that only claims to be an image."""
    root = tmp_path / "images"
    root.mkdir()
    rng = np.random.default_rng(0)
    cv2.imwrite(str(root / "b.png"), rng.integers(0, 255, (64, 48, 3), dtype=np.uint8))
    cv2.imwrite(str(root / "a.JPG"), rng.integers(0, 255, (40, 64, 3), dtype=np.uint8))
    (root / "notes.txt").write_text("no image")
    return root


def test_files_folders_and_patterns(folder):
    a, b = folder / "a.JPG", folder / "b.png"
    assert find_images([folder]) == [a, b]
    assert find_images([b, a, b]) == [b, a]
    assert find_images([f"{folder}/*.png", str(a)]) == [b, a]
    assert find_images([f"{folder.parent}/**/*.png"]) == [b]


def test_missing_files_and_equal_names_are_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"image no/such.jpg does not exist"):
        find_images(["no/such.jpg"])
    with pytest.raises(FileNotFoundError, match=r"no file matches .*\*.webp"):
        find_images([f"{folder}/*.webp"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty has no image"):
        find_images([tmp_path / "empty"])
    (tmp_path / "a.png").write_bytes((folder / "b.png").read_bytes())
    with pytest.raises(ValueError, match=r"a.JPG, .*a.png: outputs are named after the image"):
        find_images([folder / "a.JPG", tmp_path / "a.png"])


def test_pictures_and_json_equal_mmdets_inferencer(configs, float_checkpoint, folder, tmp_path):
    from mmdet.apis import DetInferencer

    results = predict(configs["float"], float_checkpoint, [folder], tmp_path / "out", device="cpu")

    files = [tmp_path / "out" / "preds" / name for name in ("a.json", "b.json")]
    paths = [str(folder / name) for name in ("a.JPG", "b.png")]
    assert results == [dict(img_path=path, json_file=file) for path, file in zip(paths, files, strict=True)]
    assert sorted(path.name for path in (tmp_path / "out" / "vis").iterdir()) == ["a.JPG", "b.png"]
    inferencer = DetInferencer(str(configs["float"]), str(float_checkpoint), device="cpu", show_progress=False)
    for name, file, size in (("a.JPG", files[0], (40, 64)), ("b.png", files[1], (64, 48))):
        found = json.loads(file.read_text())
        (expected,) = inferencer(str(folder / name))["predictions"]
        assert found == expected
        assert len(found["scores"]) == len(found["masks"]) == 5
        assert rle.decode(found["masks"][0]).shape == size
        assert cv2.imread(str(tmp_path / "out" / "vis" / name)).shape[:2] == size


@pytest.mark.parametrize("batch_size", [1, 4])
def test_good_images_are_predicted_and_bad_ones_named(configs, float_checkpoint, tmp_path, recwarn, batch_size):
    folder, out = write_images(tmp_path / "images"), tmp_path / "out"
    with pytest.raises(UnusableImagesError) as caught:
        predict(configs["float"], float_checkpoint, [folder], out, batch_size=batch_size)
    check_problems(caught.value.problems, folder)
    results = caught.value.results
    assert [result["img_path"] for result in results] == [str(folder / name) for name in USABLE]
    assert [result["json_file"] for result in results] == [
        (out / "preds" / name).with_suffix(".json") for name in USABLE
    ]
    assert all(len(json.loads(result["json_file"].read_text())["scores"]) == 5 for result in results)
    assert sorted(path.name for path in (out / "vis").iterdir()) == list(USABLE)
    assert not any("Bomb" in type(warning).__name__ or "bomb" in str(warning.message) for warning in recwarn)


def test_the_next_images_are_loaded_while_some_are_used(tmp_path):
    files = [tmp_path / f"{i}.png" for i in range(12)]
    for file in files:
        cv2.imwrite(str(file), np.zeros((4, 4, 3), np.uint8))
    files[5].write_text("no image")
    loaded, problems, limit = [], {}, Image.MAX_IMAGE_PIXELS

    def load(file: Path) -> str:
        loaded.append(file)
        return file.stem

    batches = [files[i : i + 2] for i in range(0, 12, 2)]
    usable = load_usable(batches, load, problems, 100)
    assert not loaded
    assert next(usable) == [(files[0], "0"), (files[1], "1")]
    deadline = time.monotonic() + 10
    while len(loaded) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert sorted(loaded) == sorted(files[:5])  # two batches ahead, not all of a folder; one file is no image
    assert [[stem for _, stem in batch] for batch in usable] == [
        ["2", "3"],
        ["4"],
        ["6", "7"],
        ["8", "9"],
        ["10", "11"],
    ]
    assert list(problems) == [files[5]] and limit == Image.MAX_IMAGE_PIXELS

    def fail(file: Path) -> None:
        raise RuntimeError(file.stem)

    with pytest.raises(RuntimeError, match="^0$"):  # a defect, which is not the image's
        list(load_usable(batches, fail, problems, 100))
    assert limit == Image.MAX_IMAGE_PIXELS


def test_without_any_good_image_nothing_is_predicted(configs, float_checkpoint, folder, tmp_path):
    with pytest.raises(UnusableImagesError, match=r"notes.txt is no image") as caught:
        predict(configs["float"], float_checkpoint, [folder / "notes.txt"], tmp_path / "out")
    assert caught.value.results == []


def test_images_with_too_many_pixels_are_not_decoded(configs, float_checkpoint, folder, tmp_path, monkeypatch):
    a, b = folder / "a.JPG", folder / "b.png"  # 64 x 40 and 48 x 64 pixels
    decoded = []
    decode = cv2.imdecode
    monkeypatch.setattr(cv2, "imdecode", lambda *args: decoded.append(decode(*args).shape) or decode(*args))
    with pytest.raises(UnusableImagesError, match=r"b.png has 48 x 64 pixels, more than --max-pixels 3071") as caught:
        predict(configs["float"], float_checkpoint, [a, b], tmp_path / "out", max_pixels=48 * 64 - 1)
    assert list(caught.value.problems) == [b]
    assert set(decoded) == {(40, 64, 3)}
    assert len(predict(configs["float"], float_checkpoint, [a, b], tmp_path / "out", max_pixels=48 * 64)) == 2


def test_a_file_that_may_not_be_read_is_named(configs, float_checkpoint, folder, tmp_path, monkeypatch):
    whole = Path.open

    def refuse(path, *args, **kwargs):
        if path.name == "a.JPG":
            raise PermissionError(13, "Permission denied", str(path))
        return whole(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)  # root may read everything
    with pytest.raises(UnusableImagesError, match=r"Permission denied: .*a.JPG") as caught:
        predict(configs["float"], float_checkpoint, [folder], tmp_path / "out")
    assert [result["json_file"].name for result in caught.value.results] == ["b.json"]


def test_mmdets_inferencer_warns_of_float_weights(configs, float_checkpoint, monkeypatch):
    from mmdet.apis import DetInferencer

    lines = []
    monkeypatch.setattr("mmbivit.checkpoints.fitting.print_log", lambda message, *args: lines.append(message))
    DetInferencer(str(configs["binary"]), str(float_checkpoint), device="cpu", show_progress=False)
    assert len(lines) == 1
    assert "has to be trained" in lines[0]


def test_batch_size_changes_no_detection(configs, float_checkpoint, folder, tmp_path):
    # Equal sizes, since padding to a common size changes what windows and convolutions see at the border.
    picture = cv2.imread(str(folder / "b.png"))
    for name in "cde":
        cv2.imwrite(str(folder / f"{name}.png"), np.roll(picture, 7 * ord(name), axis=0))
    results = []
    for batch_size in (1, 2):
        out = tmp_path / str(batch_size)
        found = predict(configs["float"], float_checkpoint, [f"{folder}/*.png"], out, batch_size=batch_size)
        results.append([json.loads(result["json_file"].read_text()) for result in found])
    assert len(results[0]) == 4
    for one, two in zip(*results, strict=True):
        np.testing.assert_allclose(one["bboxes"], two["bboxes"], atol=1e-3)  # float32 sums in another order
        np.testing.assert_allclose(one["scores"], two["scores"], atol=1e-5)


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("batch_size", (0,)),
        ("max_pixels", (0,)),
        ("topk", (0,)),
        ("score_thr", (float("nan"), -0.1, 1.1)),
        ("device", ("foo", "cuda:99", "cuda:x", "meta", "xpu")),
    ],
)
def test_options_without_sense_are_named_first(option, values):
    for value in values:
        with pytest.raises(ValueError, match=f"^--{option.replace('_', '-')}"):
            predict("no.py", "no.pth", ["no.jpg"], "out", **{option: value})


def test_bad_input_is_named_before_anything_is_loaded(configs, classifier_configs, folder, tmp_path):
    def refuse(message, *args, error=ValueError, **options):
        with pytest.raises(error, match=message):
            predict(*args, **options)

    images, out = [folder], tmp_path / "out"
    refuse("--out-dir DIR is needed", configs["float"], "no.pth", images)
    refuse("no.pth does not exist", configs["float"], "no.pth", images, out, error=FileNotFoundError)
    refuse("no.jpg does not exist", configs["float"], "no.pth", ["no.jpg"], out, error=FileNotFoundError)
    refuse("--topk is for classifiers, .* of a detector", configs["float"], "no.pth", images, out, topk=2)
    refuse("--score-thr is for detectors, .* of a classifier", classifier_configs["float"], "x", images, score_thr=0.0)
    refuse("predict_packed.py x.safetensors", configs["float"], "x.safetensors", images, out)
    refuse("predict_packed.py x.safetensors", classifier_configs["float"], "x.safetensors", images)
    assert not out.exists()
