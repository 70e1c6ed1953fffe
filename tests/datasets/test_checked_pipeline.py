"""Images that cannot be used are named; pictures that differ from their annotations are refused or said."""

import io

import cv2
import numpy as np
import pytest
import torch
from mmcv.transforms import LoadImageFromFile, Resize
from mmengine.dataset import BaseDataset, Compose, ConcatDataset, RepeatDataset
from PIL import Image
from torch.utils.data import DataLoader, Subset

from mmbivit.apis.errors import error_message, is_user_error
from mmbivit.datasets import checked_pipeline
from mmbivit.datasets.checked_pipeline import CheckedPipeline, check_pipelines

WIDTH, HEIGHT = 48, 32


@pytest.fixture
def picture() -> Image.Image:
    """Smooth, so that it survives JPEG, and without any symmetry."""
    small = np.random.default_rng(0).integers(0, 255, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR)


@pytest.fixture
def warnings_logged(monkeypatch) -> list[str]:
    messages = []
    monkeypatch.setattr(checked_pipeline, "print_log", lambda message, *args: messages.append(message))
    return messages


def load(path, *steps, width=WIDTH, height=HEIGHT, **options) -> np.ndarray:
    pipeline = CheckedPipeline([LoadImageFromFile(**options), *steps])
    return pipeline(dict(img_path=str(path), width=width, height=height))["img"]


def encode(picture, kind="JPEG", orientation=None, **options) -> bytes:
    if orientation is not None:
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = orientation
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


# Files


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "LA", "RGBA", "CMYK"])
def test_any_picture_has_three_channels_of_8_bits(tmp_path, picture, mode):
    path = tmp_path / "image"
    path.write_bytes(encode(picture.convert(mode), "JPEG" if mode == "CMYK" else "PNG", quality=98))
    image = load(path)
    assert image.dtype == np.uint8
    expected = np.asarray(picture.convert(mode).convert("RGB")).astype(int)
    assert np.abs(image[..., ::-1] - expected).mean() < (4 if mode == "CMYK" else 0.5)  # JPEG loses a little


@pytest.mark.parametrize("channels", [1, 3])
def test_16_bits_become_the_upper_8(tmp_path, picture, channels):
    pixels = np.asarray(picture)[..., :channels].astype(np.uint16) * 256 + 255
    cv2.imwrite(str(tmp_path / "image.png"), pixels)
    assert np.array_equal(load(tmp_path / "image.png"), np.broadcast_to(pixels >> 8, (HEIGHT, WIDTH, 3)))


@pytest.mark.parametrize("how", ["truncated", "header only", "text", "empty"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "WEBP"])
def test_names_what_cannot_be_decoded(tmp_path, picture, kind, how):
    content = encode(picture, kind)
    contents = {"truncated": content[: len(content) // 2], "header only": content[:20], "text": b"hello", "empty": b""}
    path = tmp_path / "image.jpg"
    path.write_bytes(contents[how])
    with pytest.raises(ValueError) as error:
        load(path)
    found = "is empty" if how == "empty" else "is truncated, damaged or no image: it cannot be decoded"
    assert str(error.value) == f"{path} {found}; replace it, or remove it from the annotation file"
    assert is_user_error(error.value)


def test_names_files_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing.jpg"):
        load(tmp_path / "missing.jpg")
    with pytest.raises(IsADirectoryError, match=tmp_path.name):
        load(tmp_path)


@pytest.mark.parametrize("options", [{}, dict(progressive=True), dict(restart_marker_blocks=1)])
@pytest.mark.parametrize("preview", [False, True])
def test_finds_truncated_jpeg_files_itself(tmp_path, picture, preview, options, monkeypatch):
    """As with OpenCV before 4.12, which shows grey for what is missing."""
    whole = encode(picture, **options)
    if preview:  # a whole JPEG file in front of the picture
        inner = b"Exif\0\0" + encode(picture.resize((16, 16)))
        whole = whole[:2] + b"\xff\xe1" + (len(inner) + 2).to_bytes(2, "big") + inner + whole[2:]
    path = tmp_path / "image.jpg"
    path.write_bytes(whole + b"what a phone appends")
    expected = load(path)
    monkeypatch.setattr(
        LoadImageFromFile, "transform", lambda self, results: dict(results, ori_shape=expected.shape[:2])
    )
    pipeline = CheckedPipeline([LoadImageFromFile()])
    data = dict(img_path=str(path), width=WIDTH, height=HEIGHT)
    assert pipeline(data) is not None
    for length in [*range(3, len(whole), 37), len(whole) - 2, len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="image.jpg is a truncated JPEG file"):
            pipeline(data)


# Pictures and annotations


def test_another_size_than_in_the_annotations(tmp_path, picture):
    picture.save(tmp_path / "image.png")
    with pytest.raises(ValueError, match="48 x 32 pixels, but 640 x 32 in the annotation file: correct width and heig"):
        load(tmp_path / "image.png", width=640)
    assert load(tmp_path / "image.png", width=48.0).shape == (32, 48, 3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_a_picture_that_is_turned_on_its_side(tmp_path, picture, kind, orientation, warnings_logged):
    path = tmp_path / "image"
    path.write_bytes(encode(picture, kind, orientation))
    with pytest.raises(ValueError, match=f"32 x 48 pixels, but 48 x 32 .* its EXIF orientation {orientation} turns it"):
        load(path)
    assert load(path, color_type="color_ignore_orientation").shape == (32, 48, 3)
    assert load(path, width=HEIGHT, height=WIDTH).shape == (48, 32, 3)
    with pytest.raises(ValueError, match="remove 'color_ignore_orientation'"):
        load(path, width=HEIGHT, height=WIDTH, color_type="color_ignore_orientation")
    assert warnings_logged == []


@pytest.mark.parametrize("orientation", [2, 3, 4])
def test_says_that_a_picture_is_turned(tmp_path, picture, orientation, warnings_logged):
    path = tmp_path / "image.jpg"
    path.write_bytes(encode(picture, "JPEG", orientation))
    pipeline = CheckedPipeline([LoadImageFromFile()])
    for _ in range(2):
        pipeline(dict(img_path=str(path), width=WIDTH, height=HEIGHT))
    assert len(warnings_logged) == 1
    assert warnings_logged[0].startswith(f"{path} is turned or mirrored by its EXIF orientation {orientation} ")
    load(path, color_type="color_ignore_orientation")
    assert len(warnings_logged) == 1


def test_says_that_a_square_is_turned(tmp_path, picture, warnings_logged):
    path = tmp_path / "image.jpg"
    path.write_bytes(encode(picture.crop((0, 0, 32, 32)), "JPEG", 6))
    load(path, width=32, height=32)
    assert len(warnings_logged) == 1
    path.write_bytes(encode(picture.crop((0, 0, 32, 32)), "JPEG", 1))
    load(path, width=32, height=32)
    assert len(warnings_logged) == 1


# Transforms and data sets


def test_names_the_image_with_which_a_transform_fails(tmp_path):
    path = tmp_path / "image.png"
    Image.new("RGB", (4000, 1)).save(path)
    with pytest.raises(
        ValueError, match="image.png has 4000 x 1 pixels, too thin to be resized; .*annotation"
    ) as error:
        load(path, Resize(scale=(1333, 800), keep_ratio=True), width=4000, height=1)
    assert is_user_error(error.value)
    size = dict(width=4000, height=1)
    with pytest.raises(
        ValueError, match="image.png: function fails with this image or its annotations .error"
    ) as error:
        load(path, lambda results: cv2.resize(results["img"], (0, 0)), **size)
    assert is_user_error(error.value) and "\n" not in str(error.value)

    def defect(results):
        raise KeyError("a mistake")

    with pytest.raises(RuntimeError, match="image.png: function fails with .*KeyError: 'a mistake'") as error:
        load(path, defect, width=4000, height=1)
    assert not is_user_error(error.value)
    assert isinstance(error.value.__cause__, KeyError)


@pytest.mark.parametrize("ignore_empty", [False, True])
def test_prediction_speaks_of_the_image_alone(tmp_path, picture, warnings_logged, ignore_empty):
    pipeline = CheckedPipeline(
        [LoadImageFromFile(ignore_empty=ignore_empty), Resize(scale=(64, 64), keep_ratio=True)], annotated=False
    )
    path = tmp_path / "image.jpg"
    path.write_bytes(encode(picture, orientation=3))
    assert pipeline(dict(img_path=str(path)))["img_shape"] == (43, 64)
    for content in (b"", b"hello", encode(picture)[:-100], encode(picture.resize((1, 5000)), "PNG")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"image.jpg") as error:
            pipeline(dict(img_path=str(path)))
        assert "annotation" not in str(error.value)
    assert not warnings_logged


def test_says_what_ignore_empty_leaves_out(tmp_path, warnings_logged):
    path = tmp_path / "image.png"
    path.write_bytes(b"")
    assert CheckedPipeline([LoadImageFromFile(ignore_empty=True)])(dict(img_path=str(path))) is None
    assert warnings_logged == [f"{path} cannot be read: another image is taken for it (ignore_empty=True)"]


class Images(BaseDataset):
    """One image of a name."""

    def load_data_list(self) -> list[dict]:
        """The only image."""
        return [dict(img_path=self.ann_file, width=WIDTH, height=HEIGHT)]


def test_finds_pipelines_inside_wrappers_and_workers_name_the_file(tmp_path, picture):
    picture.save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_text("hello")
    pack = lambda results: dict(inputs=torch.zeros(1))  # noqa: E731
    parts = [
        Images(ann_file=str(tmp_path / name), pipeline=[LoadImageFromFile(), pack]) for name in ("good.png", "bad.png")
    ]
    check_pipelines(Subset(RepeatDataset(parts[0], times=2), [0]))
    assert [type(part.pipeline) for part in parts] == [CheckedPipeline, Compose]
    dataset = ConcatDataset(parts)
    check_pipelines(dataset)
    assert [type(part.pipeline) for part in parts] == [CheckedPipeline, CheckedPipeline]
    with pytest.raises(ValueError) as error:
        list(DataLoader(dataset, num_workers=1))
    assert is_user_error(error.value)
    assert error_message(error.value).startswith(f"{tmp_path / 'bad.png'} is truncated, dam")


def test_other_pipelines_are_left_alone():
    dataset = Images(ann_file="image.png", pipeline=[lambda results: results])
    check_pipelines(dataset)
    assert type(dataset.pipeline) is Compose
