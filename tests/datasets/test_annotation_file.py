"""Malformed annotation files are refused in one line that names file and id; masks are read as pycocotools does."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from mmbivit.datasets.annotation_file import _decode_runs, check_segmentation, read_annotation_file


def make_content() -> dict:
    """Three images of 8 x 6 pixels, the first two with one object each."""
    corners = [1, 1, 5, 1, 5, 4, 1, 4]
    return dict(
        images=[dict(id=i, file_name=f"{i}.png", width=8, height=6) for i in (4, 2, 9)],
        annotations=[
            dict(id=10, image_id=2, category_id=7, bbox=[1, 1, 4, 3], area=12, iscrowd=0, segmentation=[corners]),
            dict(id=11, image_id=4, category_id=3, bbox=[0, 0.5, 2, 2], area=4, iscrowd=0, segmentation=[corners]),
        ],
        categories=[dict(id=7, name="cat"), dict(id=3, name="dog")],
    )


def write(folder: Path, content: object) -> str:
    path = folder / "train.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_reads_what_is_well_formed(tmp_path):
    file = read_annotation_file(write(tmp_path, make_content()))
    assert file.names == {7: "cat", 3: "dog"}
    assert file.sizes.tolist() == [[8, 6]] * 3
    assert file.image_index.tolist() == [1, 0]
    assert file.boxes.tolist() == [[1, 1, 4, 3], [0, 0.5, 2, 2]]


def test_annotations_may_be_missing_where_only_images_are_read(tmp_path):
    content = make_content()
    del content["annotations"]
    path = write(tmp_path, content)
    assert read_annotation_file(path, need_annotations=False).boxes.shape == (0, 4)
    with pytest.raises(ValueError, match="it has no 'annotations'"):
        read_annotation_file(path)


NO_JSON = {
    "empty": ("", "Expecting value: line 1 column 1"),
    "truncated": (json.dumps(make_content())[:200], "is not JSON"),
    "text": ("annotations", "Expecting value"),
    "deep": ("[" * 100_000, "recursion"),
    "long number": ('{"images": [' + "9" * 5000 + "]}", "is not JSON"),
    "list": ([], "holds a JSON list"),
    "number": ("3", "holds a JSON int"),
    "null": ("null", "holds a JSON NoneType"),
}


@pytest.mark.parametrize("name", NO_JSON)
def test_refuses_what_is_no_annotation_file(tmp_path, name):
    content, message = NO_JSON[name]
    path = write(tmp_path, content)
    with pytest.raises(ValueError, match=message) as error:
        read_annotation_file(path)
    assert str(error.value).startswith(path)
    assert "\n" not in str(error.value)


def test_refuses_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "train.json"
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(ValueError, match="train.json is not JSON .'utf-8' codec"):
        read_annotation_file(str(path))


def change(kind: str, **values):
    """Change the second item of a kind; ``...`` removes a key."""

    def apply(content):
        item = content[kind][1]
        item.update(values)
        for key in [key for key, value in values.items() if value is ...]:
            del item[key]

    return apply


BOX = "annotation 11 has bbox = .*allowed: .x, y, width, height., finite numbers"
MALFORMED = {
    "no images": (lambda c: c.pop("images"), "it has no 'images'"),
    "no categories": (lambda c: c.pop("categories"), "it has no 'categories'"),
    "images are an object": (lambda c: c.update(images={}), "its 'images' is a dict"),
    "images are empty": (lambda c: c.update(images=[], annotations=[]), "has no images"),
    "image is a list": (lambda c: c["images"].append([1]), r"image number 4 is \[1\]; expected an object"),
    "image without id": (change("images", id=...), "image number 2 has no id"),
    "image id is a list": (change("images", id=[2]), r"has id = \[2\]"),
    "image without file": (change("images", file_name=...), "image 2 has no file_name"),
    "file is a number": (change("images", file_name=3), "image 2 has file_name = 3; allowed: a text"),
    "image without width": (change("images", width=...), "image 2 has no width"),
    "height is a text": (change("images", height="6"), "image 2 has height = '6'; allowed: a number of pixels from 1"),
    "height 0": (change("images", height=0), "image 2 has height = 0"),
    "width NaN": (change("images", width=math.nan), "image 2 has width = nan"),
    "image twice": (lambda c: c["images"].append(c["images"][1]), "more than one image with the id 2"),
    "annotation is null": (lambda c: c["annotations"].append(None), "annotation number 3 is None"),
    "annotation without id": (change("annotations", id=...), "annotation number 2 has no id"),
    "annotation twice": (change("annotations", id=10), "more than one annotation with the id 10"),
    "unknown image": (change("annotations", image_id=5), "11 has image_id = 5; allowed: an id of one of its images"),
    "image id as text": (change("annotations", image_id="4"), "11 has image_id = '4'"),
    "image of a list": (change("annotations", image_id=[4]), r"11 has image_id = \[4\]"),
    "no image id": (change("annotations", image_id=...), "11 has no image_id"),
    "unknown category": (
        change("annotations", category_id=1),
        "11 has category_id = 1; allowed: an id of one of its ca",
    ),
    "no category": (change("annotations", category_id=...), "11 has no category_id"),
    "no box": (change("annotations", bbox=...), "11 has no bbox"),
    "box is null": (change("annotations", bbox=None), BOX),
    "box is text": (change("annotations", bbox="abcd"), BOX),
    "box of texts": (change("annotations", bbox=["1", "2", "3", "4"]), BOX),
    "box of lists": (change("annotations", bbox=[[1], 2, 3, 4]), BOX),
    "box of three": (change("annotations", bbox=[1, 2, 3]), BOX),
    "empty box": (change("annotations", bbox=[]), BOX),
    "NaN first": (change("annotations", bbox=[math.nan, 1, 2, 2]), BOX),
    "NaN last": (change("annotations", bbox=[1, 1, 2, math.nan]), BOX),
    "infinite": (change("annotations", bbox=[1, 1, math.inf, 2]), BOX),
    "minus infinite": (change("annotations", bbox=[-math.inf, 1, 2, 2]), BOX),
    "huge": (change("annotations", bbox=[1, 1, 10**400, 2]), BOX),
    "far to the left": (change("annotations", bbox=[-100_001, 1, 2, 2]), BOX),
    "negative width": (change("annotations", bbox=[5, 5, -2, 2]), BOX),
    "negative height": (change("annotations", bbox=[5, 5, 2, -2]), BOX),
    "no area": (change("annotations", area=...), "11 has no area"),
    "area NaN": (change("annotations", area=math.nan), "11 has area = nan; allowed: a finite number"),
    "iscrowd is text": (change("annotations", iscrowd="no"), "11 has iscrowd = 'no'; allowed: 0 or 1"),
    "category without name": (change("categories", name=...), "category 3 has no name"),
    "category id twice": (change("categories", id=7), "more than one category with the id 7"),
    "category name twice": (change("categories", name="cat"), "more than one category with the name 'cat'"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_refuses_what_is_malformed(tmp_path, name):
    spoil, message = MALFORMED[name]
    content = make_content()
    spoil(content)
    path = write(tmp_path, content)
    with pytest.raises(ValueError, match=message) as error:
        read_annotation_file(path)
    assert str(error.value).startswith(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < len(path) + 250


# Masks


def check(tmp_path, segmentation: object) -> tuple[int, int]:
    content = make_content()
    content["annotations"][1]["segmentation"] = segmentation
    return check_segmentation(read_annotation_file(write(tmp_path, content)), 1)


TRIANGLE = [0, 0, 4, 0, 4, 4]


@pytest.mark.parametrize(
    ("segmentation", "usable"),
    [
        ([TRIANGLE], (1, 0)),
        ([TRIANGLE, [-3, 0.5, 20, 0, 4, 4, 2, 2]], (2, 0)),
        ([TRIANGLE, TRIANGLE[:-1], [1, 1, 2, 2]], (1, 2)),
        ([[1, 1]], (0, 1)),
        (dict(size=[6, 8], counts=[10, 20, 18]), (1, 0)),
        (dict(size=[6, 8], counts=[0, 48]), (1, 0)),
        (dict(size=[6, 8], counts="0`1"), (1, 0)),
    ],
)
def test_counts_parts_of_a_mask(tmp_path, segmentation, usable):
    assert check(tmp_path, segmentation) == usable


NO_MASKS = {
    "null": None,
    "empty": [],
    "empty object": {},
    "text": "abc",
    "number": 3,
    "flat": TRIANGLE,
    "empty polygon": [[]],
    "points": [[[0, 0], [4, 0], [4, 4]]],
    "texts": [["0", "0", "4", "0", "4", "4"]],
    "NaN, on which pycocotools hangs": [[0, 0, math.nan, 0, 4, 4]],
    "infinite": [[0, 0, math.inf, 0, 4, 4]],
    "so large that pycocotools hangs": [[0, 0, 1e12, 0, 4, 1e12]],
    "no counts": dict(size=[6, 8]),
    "no size": dict(counts=[10, 20, 18]),
    "width before height": dict(size=[8, 6], counts=[10, 20, 18]),
    "too few runs": dict(size=[6, 8], counts=[10, 20]),
    "too many runs": dict(size=[6, 8], counts=[10, 20, 19]),
    "negative run": dict(size=[6, 8], counts=[-2, 50]),
    "fractional run": dict(size=[6, 8], counts=[10.5, 20, 17.5]),
    "runs are a number": dict(size=[6, 8], counts=48),
    "no run": dict(size=[6, 8], counts=""),
    "other characters": dict(size=[6, 8], counts="0 1"),
    "text without end": dict(size=[6, 8], counts="0``"),
    "text of too few runs": dict(size=[6, 8], counts="01"),
    "text of a huge run": dict(size=[6, 8], counts="o" * 30 + "0"),
    "text of runs 0, 49, -1": dict(size=[6, 8], counts="0a1O"),
    "text of runs 0, 48 with more digits than a number has": dict(size=[6, 8], counts="0`Q" + "P" * 12 + "0"),
    "so far to the left that pycocotools hangs": [[0, 0, -1e12, 0, 4, 4]],
}


@pytest.mark.parametrize("name", NO_MASKS)
def test_refuses_what_is_no_mask(tmp_path, name):
    with pytest.raises(ValueError, match="train.json: annotation 11 has .*; allowed: a list of polygons") as error:
        check(tmp_path, NO_MASKS[name])
    assert "\n" not in str(error.value)


def test_runs_are_those_of_pycocotools():
    """Encode random masks with pycocotools, decode them here."""
    rng = np.random.default_rng(0)
    for share in [0, 1, *rng.choice([0.001, 0.01, 0.1, 0.5, 0.9], 300)]:
        height, width = rng.integers(1, 90, 2)
        mask = (rng.random((height, width)) < share).astype(np.uint8)
        runs = _decode_runs(coco_mask.encode(np.asfortranarray(mask))["counts"].decode())
        assert np.array_equal(np.repeat(np.arange(len(runs)) % 2, runs), mask.T.ravel())
    mask = np.zeros((1000, 3000), dtype=np.uint8)  # runs of more than five digits
    mask[400, 2000] = 1
    runs = _decode_runs(coco_mask.encode(np.asfortranarray(mask))["counts"].decode())
    assert runs == [2_000_400, 1, 999_599]
