"""The digit scenes: made of what they say, valid COCO, equal every time, and never half there."""

import contextlib
import hashlib
import importlib.util
import io
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from mmbivit.datasets import DIGIT_CLASSES, DigitScenes, draw_scenes, make_digit_scenes

pytest.importorskip("skimage")
load_digits = pytest.importorskip("sklearn.datasets").load_digits

SMALL = {"train": 12, "val": 6, "size": 64}
SPLITS = ("train", "val")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> DigitScenes:
    return make_digit_scenes(tmp_path_factory.mktemp("data") / "plain", **SMALL)


@pytest.fixture(scope="module")
def coco_layout(tmp_path_factory) -> DigitScenes:
    options = {**SMALL, "size": (60, 80), "layout": "coco"}
    return make_digit_scenes(tmp_path_factory.mktemp("data") / "coco", **options)


def read(scenes: DigitScenes, split: str) -> dict:
    return json.loads(scenes.ann_file(split).read_text())


def load_coco(scenes: DigitScenes, split: str) -> COCO:
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(scenes.ann_file(split)))


def fingerprint(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def read_photo_crop(image: dict) -> np.ndarray:
    """The background of a scene, from its provenance alone."""
    package, _, name = image["photo"].partition("/")
    x, y, width, height = image["photo_box"]
    photo = Image.open(Path(importlib.util.find_spec(package).origin).parent / name).convert("RGB")
    assert x >= 0 and y >= 0 and x + width <= photo.width and y + height <= photo.height
    crop = photo.crop((x, y, x + width, y + height))
    return np.asarray(crop.resize((image["width"], image["height"]), Image.Resampling.BILINEAR))


# What is made


@pytest.mark.parametrize("layout", ["digit_scenes", "coco"])
def test_same_options_give_the_same_bytes(tmp_path, layout):
    roots = [make_digit_scenes(tmp_path / name, train=3, val=2, size=48, layout=layout).root for name in "ab"]
    assert fingerprint(roots[0]) == fingerprint(roots[1])
    assert len(fingerprint(roots[0])) == 3 + 2 + 2 + 1  # images, annotations, description


def test_another_seed_gives_other_scenes(tmp_path, plain):
    other = make_digit_scenes(tmp_path / "other", **SMALL, seed=1)
    before, after = fingerprint(plain.root), fingerprint(other.root)
    assert before.keys() == after.keys()
    assert not any(before[name] == after[name] for name in before)


def test_a_smaller_set_is_the_beginning_of_a_larger_one(tmp_path, plain):
    fewer = make_digit_scenes(tmp_path / "fewer", train=2, val=1, size=64)
    before, after = fingerprint(plain.root), fingerprint(fewer.root)
    images = [name for name in after if name.endswith(".png")]
    assert len(images) == 3
    assert all(before[name] == after[name] for name in images)


@pytest.mark.parametrize("split", SPLITS)
def test_annotations_are_valid_coco(plain, coco_layout, split):
    for scenes, size in ((plain, (64, 64)), (coco_layout, (60, 80))):
        coco = load_coco(scenes, split)
        assert len(coco.imgs) == SMALL[split]
        assert sorted(path.name for path in scenes.image_dir(split).iterdir()) == sorted(
            image["file_name"] for image in coco.imgs.values()
        )
        for image_id, image in coco.imgs.items():
            with Image.open(scenes.image_dir(split) / image["file_name"]) as pixels:
                assert pixels.size == size[::-1] and pixels.mode == "RGB"
            annotations = coco.imgToAnns[image_id]
            assert 1 <= len(annotations) <= 6
            total = np.zeros(size, int)
            for annotation in annotations:
                mask = coco.annToMask(annotation)
                rows, columns = np.nonzero(mask)
                x, y = columns.min(), rows.min()
                assert annotation["bbox"] == [x, y, columns.max() - x + 1, rows.max() - y + 1]
                assert annotation["area"] == mask.sum() > 0
                assert annotation["iscrowd"] == 0
                total += mask
            assert total.max() == 1  # the visible parts: no pixel belongs to two digits


def test_ids_are_unique_across_images(plain):
    annotations = read(plain, "train")["annotations"]
    assert [annotation["id"] for annotation in annotations] == list(range(1, len(annotations) + 1))


def test_pixels_outside_the_masks_are_the_photo(plain):
    for split in SPLITS:
        coco = load_coco(plain, split)
        for image_id, image in coco.imgs.items():
            pixels = np.asarray(Image.open(plain.image_dir(split) / image["file_name"])).astype(int)
            masks = np.any([coco.annToMask(annotation) for annotation in coco.imgToAnns[image_id]], axis=0)
            photo = read_photo_crop(image)
            assert np.array_equal(pixels[~masks], photo[~masks])
            assert (np.abs(pixels - photo).sum(axis=-1)[masks] > 0).mean() > 0.95  # and inside there is ink


def test_jpeg_scenes_are_the_photo_within_its_compression(coco_layout):
    coco = load_coco(coco_layout, "val")
    for image_id, image in coco.imgs.items():
        pixels = np.asarray(Image.open(coco_layout.image_dir("val") / image["file_name"])).astype(int)
        masks = np.any([coco.annToMask(annotation) for annotation in coco.imgToAnns[image_id]], axis=0)
        # Median, because JPEG's blocks carry the ink's edges a few pixels outwards.
        assert np.median(np.abs(pixels - read_photo_crop(image))[~masks]) <= 4


def test_classes_are_those_of_the_samples(plain, coco_layout):
    targets = load_digits().target
    for scenes in (plain, coco_layout):
        for split in SPLITS:
            annotations = read(scenes, split)["annotations"]
            assert all(item["category_id"] == targets[item["digit_index"]] + 1 for item in annotations)
            counts = Counter(str(targets[item["digit_index"]]) for item in annotations)
            assert scenes.instances[split] == {name: counts[name] for name in DIGIT_CLASSES}


def test_masks_look_like_their_samples(plain):
    # Shrunk to the size of its sample, a mask must correlate with it; the median, because some are turned or occluded.
    images = load_digits().images / 16
    coco = load_coco(plain, "train")
    scores = []
    for annotation in coco.anns.values():
        x, y, width, height = annotation["bbox"]
        mask = Image.fromarray(255 * coco.annToMask(annotation)[y : y + height, x : x + width])
        ink = images[annotation["digit_index"]]
        rows, columns = np.nonzero(ink > 0.45)
        sample = ink[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        small = np.asarray(mask.resize(sample.shape[::-1], Image.Resampling.BOX)) / 255
        scores.append(np.corrcoef(small.ravel(), sample.ravel())[0, 1])
    assert np.nanmedian(scores) > 0.7


def test_splits_share_no_digit_and_no_photo(tmp_path):
    scenes = make_digit_scenes(tmp_path / "many", train=60, val=40, size=32)
    digits = [{item["digit_index"] for item in read(scenes, split)["annotations"]} for split in SPLITS]
    photos = [{item["photo"] for item in read(scenes, split)["images"]} for split in SPLITS]
    assert not digits[0] & digits[1]
    assert not photos[0] & photos[1]
    assert len(photos[0]) == 8 and len(photos[1]) == 4  # all of them are used
    assert len(digits[0]) > 150  # of 1397: samples repeat rarely


def test_default_statistics(tmp_path):
    scenes = make_digit_scenes(tmp_path / "scenes", train=40, val=1)
    annotations = read(scenes, "train")["annotations"]
    heights = np.array([item["bbox"][3] for item in annotations])
    assert 3 <= len(annotations) / 40 <= 4
    # Rotation and occlusion change a height a little; nine of ten must be in the range asked for.
    assert np.quantile(heights, 0.05) >= 15 and np.quantile(heights, 0.95) <= 50 and np.ptp(heights) > 20


def test_ink_stands_out(plain):
    # The mean over a digit's visible mask, against the photo that was there.
    coco = load_coco(plain, "train")
    differences = []
    for annotation in coco.anns.values():
        image = coco.imgs[annotation["image_id"]]
        mask = coco.annToMask(annotation).astype(bool)
        pixels = np.asarray(Image.open(plain.image_dir("train") / image["file_name"]).convert("L")).astype(float)
        photo = np.asarray(Image.fromarray(read_photo_crop(image)).convert("L")).astype(float)
        differences.append(abs(pixels[mask].mean() - photo[mask].mean()))
    # 100 at full ink away from other digits, less where the strokes fade or another digit had to be told apart
    assert np.median(differences) > 80 and min(differences) > 35


# MMDetection reads it


def load_mmdet(scenes: DigitScenes, split: str, **kwargs):
    from mmcv.transforms import LoadImageFromFile
    from mmdet.datasets import CocoDataset
    from mmdet.datasets.transforms import LoadAnnotations

    with contextlib.redirect_stdout(io.StringIO()):
        return CocoDataset(
            data_root=str(scenes.root),
            ann_file=str(scenes.ann_file(split).relative_to(scenes.root)),
            data_prefix={"img": scenes.image_dir(split).name},
            filter_cfg={"filter_empty_gt": True, "min_size": 32},
            pipeline=[LoadImageFromFile(), LoadAnnotations(with_bbox=True, with_mask=True)],
            **kwargs,
        )


@pytest.mark.parametrize("split", SPLITS)
def test_mmdet_loads_both_layouts(plain, coco_layout, split):
    for scenes, kwargs in ((plain, {"metainfo": {"classes": DIGIT_CLASSES}}), (coco_layout, {})):
        dataset = load_mmdet(scenes, split, **kwargs)
        coco = load_coco(scenes, split)
        assert len(dataset) == SMALL[split]
        targets = load_digits().target
        for index in range(len(dataset)):
            item = dataset[index]
            annotations = coco.imgToAnns[item["img_id"]]
            digits = [int(targets[annotation["digit_index"]]) for annotation in annotations]
            assert item["gt_bboxes_labels"].tolist() == digits
            assert not item["gt_ignore_flags"].any()  # mmdet ignores masks that it cannot read
            expected = np.stack([coco.annToMask(annotation) for annotation in annotations])
            assert np.array_equal(item["gt_masks"].masks, expected)
            boxes = np.array([annotation["bbox"] for annotation in annotations])
            boxes[:, 2:] += boxes[:, :2]
            assert np.array_equal(item["gt_bboxes"].tensor.numpy(), boxes)


def test_coco_layout_has_all_classes_of_coco(coco_layout):
    dataset = load_mmdet(coco_layout, "train")
    assert len(dataset.cat_ids) == len(dataset.metainfo["classes"]) == 80
    categories = {item["id"]: item["name"] for item in read(coco_layout, "train")["categories"]}
    # In the order of the ids the names must be mmdet's, or labels would be mixed up.
    assert [categories[index] for index in dataset.cat_ids] == list(dataset.metainfo["classes"])
    known = {1: "person", 11: "fire hydrant", 13: "stop sign", 44: "bottle", 67: "dining table", 90: "toothbrush"}
    assert known.items() <= categories.items()
    assert sorted(path.name for path in coco_layout.root.iterdir()) == [
        "annotations",
        "digit_scenes.json",
        "train2017",
        "val2017",
    ]
    assert (coco_layout.root / "train2017" / "000000000001.jpg").is_file()


# Folders


def test_existing_set_is_reused(plain):
    before = fingerprint(plain.root)
    times = {path: path.stat().st_mtime_ns for path in plain.root.rglob("*")}
    calls = []
    again = make_digit_scenes(plain.root, **SMALL, progress=lambda: calls.append(1))
    assert again.reused and not plain.reused and again == plain and not calls
    assert fingerprint(plain.root) == before
    assert {path: path.stat().st_mtime_ns for path in plain.root.rglob("*")} == times


def test_other_options_are_refused_and_overwritten(tmp_path):
    out = tmp_path / "scenes"
    make_digit_scenes(out, train=2, val=1, size=32)
    with pytest.raises(FileExistsError, match=r"seed=0 \(asked for: 3\).*overwrite"):
        make_digit_scenes(out, train=2, val=1, size=32, seed=3)
    scenes = make_digit_scenes(out, train=2, val=1, size=32, seed=3, overwrite=True)
    assert scenes.options["seed"] == 3 and not scenes.reused
    assert list(tmp_path.iterdir()) == [out]


def test_damaged_set_is_not_reused(tmp_path):
    out = tmp_path / "scenes"
    scenes = make_digit_scenes(out, train=2, val=1, size=32)
    (scenes.image_dir("train") / "000002.png").unlink()
    with pytest.raises(FileExistsError, match="1 files are missing"):
        make_digit_scenes(out, train=2, val=1, size=32)
    (out / "digit_scenes.json").write_text("{")
    with pytest.raises(FileExistsError, match="cannot be read"):
        make_digit_scenes(out, train=2, val=1, size=32)


def test_foreign_folder_is_refused_and_never_deleted(tmp_path):
    out = tmp_path / "coco"
    out.mkdir()
    (out / "precious.txt").write_text("data")
    with pytest.raises(FileExistsError, match="was not made by make_digit_scenes"):
        make_digit_scenes(out, train=1, val=1, size=32)
    assert [path.name for path in out.iterdir()] == ["precious.txt"]
    make_digit_scenes(out, train=1, val=1, size=32, overwrite=True)
    assert (tmp_path / "coco.old" / "precious.txt").read_text() == "data"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["coco", "coco.old"]

    other = tmp_path / "file"
    other.write_text("a file")
    with pytest.raises(FileExistsError):
        make_digit_scenes(other, train=1, val=1, size=32)
    (tmp_path / "file.old").mkdir()
    with pytest.raises(FileExistsError, match="remove one"):
        make_digit_scenes(other, train=1, val=1, size=32, overwrite=True)
    assert other.read_text() == "a file"


def test_empty_folder_and_link_are_used(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    link = tmp_path / "link"
    link.symlink_to(disk)
    make_digit_scenes(link, train=1, val=1, size=32)
    assert link.is_symlink() and (disk / "digit_scenes.json").is_file()


@pytest.mark.parametrize("overwrite", [False, True])
def test_interrupt_leaves_nothing_half_made(tmp_path, overwrite):
    out = tmp_path / "scenes"
    before = {}
    if overwrite:
        before = fingerprint(make_digit_scenes(out, train=1, val=1, size=32).root)
    calls = []

    def interrupt() -> None:
        calls.append(1)
        assert not out.exists() or overwrite
        if len(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_digit_scenes(out, train=2, val=2, size=32, overwrite=overwrite, progress=interrupt)
    assert list(tmp_path.iterdir()) == ([out] if overwrite else [])
    assert not overwrite or fingerprint(out) == before


def test_invalid_set_is_not_installed(tmp_path, monkeypatch):
    from mmbivit.datasets import digit_scenes

    make_annotation = digit_scenes._annotation
    monkeypatch.setattr(digit_scenes, "_annotation", lambda *args: {**make_annotation(*args), "area": 1})
    with pytest.raises(RuntimeError, match="do not agree"):
        make_digit_scenes(tmp_path / "scenes", train=1, val=1, size=32)
    assert not list(tmp_path.iterdir())


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": 0}, "train=0; allowed: an integer of 1 or more"),
        ({"val": -1}, "val=-1; allowed"),
        ({"val": 1.5}, "val=1.5; allowed"),
        ({"max_digits": 0}, "max_digits=0; allowed"),
        ({"seed": -1}, "seed=-1; allowed"),
        ({"size": 31}, r"size\[0\]=31; allowed: an integer of 32 or more"),
        ({"size": (64, 16)}, r"size\[1\]=16; allowed"),
        ({"size": (64, 64, 64)}, "one number or a .height, width. pair"),
        ({"size": "64"}, "one number or a .height, width. pair"),
        ({"layout": "voc"}, "layout must be one of digit_scenes, coco, got 'voc'"),
    ],
)
def test_wrong_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_digit_scenes(tmp_path / "scenes", **options)
    assert not list(tmp_path.iterdir())


def test_missing_package_is_explained(tmp_path, monkeypatch):
    from mmbivit.datasets import scene_rendering

    monkeypatch.setitem(sys.modules, "skimage", None)
    scene_rendering._load_photo.cache_clear()
    with pytest.raises(ModuleNotFoundError, match=r"mmbivit\[demo\]"):
        make_digit_scenes(tmp_path / "scenes", train=1, val=1, size=32)
    assert not list(tmp_path.iterdir())


# Picture and tool


@pytest.mark.parametrize("split", SPLITS)
def test_draw_scenes(plain, coco_layout, split):
    for scenes in (plain, coco_layout):
        figure = draw_scenes(scenes.root, split, count=5)
        annotations = [item for item in read(scenes, split)["annotations"] if item["image_id"] <= 5]
        assert len(figure.axes) == 5
        assert sum(len(axes.texts) for axes in figure.axes) == len(annotations)
        assert sum(len(axes.patches) for axes in figure.axes) == len(annotations)
        buffer = io.BytesIO()
        figure.savefig(buffer)
        assert buffer.tell() > 10_000


def test_draw_scenes_errors(plain, tmp_path):
    with pytest.raises(ValueError, match="split must be one of train, val"):
        draw_scenes(plain.root, "test")
    with pytest.raises(ValueError, match="count=0; allowed"):
        draw_scenes(plain.root, count=0)
    with pytest.raises(FileNotFoundError, match="not a digit scenes folder"):
        draw_scenes(tmp_path)


def run_tool(*arguments: str | Path) -> subprocess.CompletedProcess:
    code = (
        "import runpy, sys\n"
        "sys.modules['mmdet'] = None  # importing it would raise: the tool must not need it\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        f"sys.argv = ['make_digit_scenes.py', *{[str(item) for item in arguments]!r}]\n"
        f"runpy.run_path({str(ROOT / 'tools' / 'make_digit_scenes.py')!r}, run_name='__main__')\n"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_tool(tmp_path):
    out, picture = tmp_path / "scenes", tmp_path / "pictures" / "scenes.png"
    arguments = ("--out", out, "--train", "3", "--val", "2", "--size", "40", "56", "--picture", picture)
    done = run_tool(*arguments)
    assert done.returncode == 0, done.stderr
    scenes = DigitScenes.load(out)
    assert scenes.options["size"] == [40, 56]
    assert "instances" in done.stdout and str(sum(scenes.instances["train"].values())) in done.stdout
    assert str(out) in done.stdout
    with Image.open(picture) as pixels:
        assert pixels.size[0] > 300
