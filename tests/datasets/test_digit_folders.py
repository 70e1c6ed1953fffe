"""The digit folders: one whole digit an image, clutter that is none, splits that share nothing, equal every time."""

import errno
import hashlib
import importlib.util
import json
import os
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmbivit.datasets import DigitFolders, draw_digit_folders, make_digit_folders, make_digit_scenes

pytest.importorskip("skimage")
load_digits = pytest.importorskip("sklearn.datasets").load_digits

from mmbivit.datasets.digit_folders import make_cluttered_digit  # noqa: E402
from mmbivit.datasets.scene_rendering import render_digit  # noqa: E402

SMALL = {"train": 43, "val": 20, "size": 40}
SPLITS = ("train", "val")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> DigitFolders:
    return make_digit_folders(tmp_path_factory.mktemp("data") / "digits", **SMALL)


@pytest.fixture(scope="module")
def rendered() -> list[tuple[np.ndarray, np.ndarray, dict]]:
    rngs = [np.random.default_rng(seed) for seed in range(150)]
    return [make_cluttered_digit(rng, SPLITS[n % 2], n % 10, 48, (2, 4)) for n, rng in enumerate(rngs)]


def fingerprint(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def read_photo_crop(record: dict, size: int) -> np.ndarray:
    """The background of an image, from its provenance alone."""
    package, _, name = record["photo"].partition("/")
    x, y, width, height = record["photo_box"]
    photo = Image.open(Path(importlib.util.find_spec(package).origin).parent / name).convert("RGB")
    crop = photo.crop((x, y, x + width, y + height))
    return np.asarray(crop.resize((size, size), Image.Resampling.BILINEAR))


# What is made


def test_same_options_give_the_same_bytes(tmp_path, folders):
    again = make_digit_folders(tmp_path / "again", **SMALL)
    assert fingerprint(again.root) == fingerprint(folders.root)
    assert len(fingerprint(again.root)) == 43 + 20 + 2 + 1  # images, records, description


def test_another_seed_gives_other_images(tmp_path, folders):
    other = make_digit_folders(tmp_path / "other", **SMALL, seed=1)
    before, after = fingerprint(folders.root), fingerprint(other.root)
    assert before.keys() == after.keys()
    assert not any(before[name] == after[name] for name in before)


def test_a_smaller_set_is_the_beginning_of_a_larger_one(tmp_path, folders):
    fewer = make_digit_folders(tmp_path / "fewer", train=11, val=10, size=40)
    before, after = fingerprint(folders.root), fingerprint(fewer.root)
    images = [name for name in after if name.endswith(".png")]
    assert len(images) == 21
    assert all(before[name] == after[name] for name in images)
    assert fewer.records("train") == folders.records("train")[:11]


@pytest.mark.parametrize("split", SPLITS)
def test_class_folders_are_balanced_and_readable(folders, split):
    found = Counter()
    for path in (folders.root / split).rglob("*.png"):
        with Image.open(path) as image:
            assert image.size == (40, 40) and image.mode == "RGB"
            image.load()
        found[path.parent.name] += 1
    assert sorted(found) == list("0123456789") == sorted(path.name for path in (folders.root / split).iterdir())
    assert found == folders.images[split] and sum(found.values()) == SMALL[split]
    assert max(found.values()) - min(found.values()) <= 1


def test_labels_are_those_of_the_samples(folders):
    targets = load_digits().target
    for split in SPLITS:
        files = []
        for record in folders.records(split):
            assert Path(record["file"]).parts[:2] == (split, str(record["digit"]))
            assert targets[record["index"]] == record["digit"]
            assert all(targets[part["index"]] == part["digit"] for part in record["clutter"])
            files.append(folders.root / record["file"])
        assert sorted(files) == sorted((folders.root / split).rglob("*.png"))


def test_splits_share_no_digit_and_no_photo(tmp_path):
    folders = make_digit_folders(tmp_path / "many", train=100, val=60, size=32)
    digits, photos = [], []
    for split in SPLITS:
        records = folders.records(split)
        photos.append({record["photo"] for record in records})
        digits.append({part["index"] for record in records for part in (record, *record["clutter"])})
    assert max(digits[0]) < 1397 <= min(digits[1])  # one cut, which keeps most hands on one side
    assert not photos[0] & photos[1]
    assert len(photos[0]) == 8 and len(photos[1]) == 4  # all of them are used


def test_one_whole_digit_that_stays_visible(rendered):
    images = load_digits().images / 16
    heights, shares, scores = [], [], []
    for _, layers, record in rendered:
        x, y, width, height = record["box"]
        rows, columns = np.nonzero(layers == 1)
        assert (columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1) == (x, y, width, height)
        shares.append(record["visible"])
        heights.append(height)
        if record["visible"] < 1:
            continue
        # Shrunk to the size of its sample, the digit looks like it.
        ink = images[record["index"]]
        rows, columns = np.nonzero(ink > 0.45)
        sample = ink[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        mask = Image.fromarray(255 * (layers == 1)[y : y + height, x : x + width].astype(np.uint8))
        small = np.asarray(mask.resize(sample.shape[::-1], Image.Resampling.BOX)) / 255
        scores.append(np.corrcoef(small.ravel(), sample.ravel())[0, 1])
    assert min(shares) >= 0.75 and max(shares) == 1
    assert np.nanmedian(scores) > 0.7
    # Between 60 and 85 % of 48 pixels where nothing is turned or covered, so most of them
    assert np.quantile(heights, 0.1) >= 0.55 * 48 and np.quantile(heights, 0.95) <= 0.9 * 48 and np.ptp(heights) > 12


def test_clutter_is_never_a_whole_digit(rendered):
    counts = Counter(len(record["clutter"]) for *_, record in rendered)
    assert set(counts) <= {0, 1, 2, 3, 4} and all(counts[n] > 0.15 * len(rendered) for n in (2, 3, 4))
    ratios = []
    for _, layers, record in rendered:
        assert layers.max() == 1 + len(record["clutter"])
        assert all(0 < part["share"] < 0.5 for part in record["clutter"])
        whole = (layers == 1).sum() / record["visible"]
        ratios += [(layers == 2 + n).sum() / whole for n in range(len(record["clutter"]))]
    assert 0.2 < np.median(ratios) < 0.5  # about a third of the digit's ink
    assert {part["digit"] for *_, record in rendered for part in record["clutter"]} == set(range(10))


def test_share_is_that_of_the_rendered_sample():
    # Without a digit in its way the fragment shows all its ink; the whole one is rendered here a second time.
    from mmbivit.datasets.digit_folders import _cut

    whole = render_digit(load_digits().images[5] / 16, 30.0, 1.0, 0.1)
    for seed in range(20):
        part = _cut(np.random.default_rng(seed), whole)
        share = (part > 0.45).sum() / (whole > 0.45).sum()
        assert 0.22 < share <= 0.4
        assert (part > 0.45).any(axis=0)[[0, -1]].all() and (part > 0.45).any(axis=1)[[0, -1]].all()  # tight


def test_pixels_are_photo_outside_and_ink_inside(rendered):
    gaps = []
    for image, layers, record in rendered:
        photo = read_photo_crop(record, 48) // 2
        assert np.array_equal(image[layers == 0], photo[layers == 0])
        grey = [
            np.asarray(Image.fromarray(pixels).convert("L"), float)[layers == 1].mean() for pixels in (image, photo)
        ]
        gaps.append(grey[0] - grey[1])
    # At least 190 - 128 at full ink, and strokes fade to 75 %: 0.75 * 62 = 46; most photographs are darker
    assert np.median(gaps) > 80 and min(gaps) > 46


def test_clutter_has_other_colours(rendered):
    gaps = []
    for image, layers, record in rendered:
        means = [image[layers == n].mean(axis=0) for n in range(1, 2 + len(record["clutter"])) if (layers == n).any()]
        gaps += [np.abs(mean - means[0]).max() for mean in means[1:]]
    assert np.quantile(gaps, 0.05) > 10 and np.median(gaps) > 60


def test_no_clutter():
    _, layers, record = make_cluttered_digit(np.random.default_rng(0), "train", 3, 48, (0, 0))
    assert layers.max() == 1 and record["clutter"] == [] and record["visible"] == 1


def test_any_size_fits():
    for digit in range(10):
        image, layers, _ = make_cluttered_digit(np.random.default_rng(digit), "val", digit, 32, (6, 6))
        assert image.shape == (32, 32, 3) and image.dtype == np.uint8 and layers.shape == (32, 32)


# Folders


def test_existing_set_is_reused(folders):
    before = {path: path.stat().st_mtime_ns for path in folders.root.rglob("*")}
    calls = []
    again = make_digit_folders(folders.root, **SMALL, progress=lambda: calls.append(1))
    assert again.reused and not folders.reused and again == folders and not calls
    assert {path: path.stat().st_mtime_ns for path in folders.root.rglob("*")} == before


def test_marker_says_what_was_made(folders):
    content = json.loads((folders.root / "digit_folders.json").read_text())
    assert content["options"] == {**SMALL, "seed": 0, "clutter": [1, 2], "generator": 1}
    assert "scikit-learn" in content["versions"] and "CC BY" in content["credits"]


def test_other_options_and_damage_are_refused(tmp_path):
    out = tmp_path / "digits"
    options = {"train": 10, "val": 10, "size": 32}
    made = make_digit_folders(out, **options)
    with pytest.raises(FileExistsError, match=r"clutter=\[1, 2\] \(asked for: \[2, 4\]\).*overwrite"):
        make_digit_folders(out, **options, clutter=(2, 4))
    (out / made.records("val")[3]["file"]).unlink()
    with pytest.raises(FileExistsError, match="1 files are missing"):
        make_digit_folders(out, **options)
    (out / "digit_folders.json").write_text("{")
    with pytest.raises(FileExistsError, match="cannot be read"):
        make_digit_folders(out, **options)
    with pytest.raises(FileNotFoundError, match="not a digit folders data set.*--layout folders"):
        DigitFolders.load(out)
    again = make_digit_folders(out, **options, clutter=(2, 4), overwrite=True)
    assert again.options["clutter"] == [2, 4] and not again.reused
    assert list(tmp_path.iterdir()) == [out]


def test_a_full_disk_names_the_folder_and_leaves_nothing(tmp_path, monkeypatch):
    def save(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(OSError, match=r"No space left on device: '.*digits'$"):
        make_digit_folders(tmp_path / "digits", train=10, val=10)
    assert not list(tmp_path.iterdir())


def test_foreign_folder_is_refused_and_never_deleted(tmp_path):
    out = tmp_path / "imagenet"
    (out / "train").mkdir(parents=True)
    (out / "train" / "precious.txt").write_text("data")
    with pytest.raises(FileExistsError, match="was not made by make_digit_folders"):
        make_digit_folders(out, train=10, val=10, size=32)
    assert fingerprint(out).keys() == {"train/precious.txt"} and list(tmp_path.iterdir()) == [out]
    make_digit_folders(out, train=10, val=10, size=32, overwrite=True)
    assert (tmp_path / "imagenet.old" / "train" / "precious.txt").read_text() == "data"


def test_digit_scenes_are_something_else(tmp_path):
    scenes = make_digit_scenes(tmp_path / "scenes", train=1, val=1, size=32)
    with pytest.raises(FileExistsError, match="was not made by make_digit_folders"):
        make_digit_folders(scenes.root, train=10, val=10, size=32)
    folders = make_digit_folders(tmp_path / "digits", train=10, val=10, size=32)
    with pytest.raises(FileExistsError, match="was not made by make_digit_scenes"):
        make_digit_scenes(folders.root, train=1, val=1, size=32)


def test_interrupt_leaves_nothing_half_made(tmp_path):
    def interrupt() -> None:
        assert not (tmp_path / "digits").exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_digit_folders(tmp_path / "digits", train=10, val=10, size=32, progress=interrupt)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": 9}, "train=9; allowed: an integer of 10 or more"),
        ({"val": 0}, "val=0; allowed"),
        ({"size": 31}, "size=31; allowed: an integer of 32 or more"),
        ({"size": (48, 48)}, r"size=\(48, 48\); allowed"),
        ({"seed": -1}, "seed=-1; allowed"),
        ({"clutter": 3}, "clutter must be a .least, most. pair"),
        ({"clutter": (-1, 2)}, r"clutter\[0\]=-1; allowed"),
        ({"clutter": (3, 2)}, r"clutter\[1\]=2; allowed: an integer of 3 or more"),
    ],
)
def test_wrong_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_digit_folders(tmp_path / "digits", **options)
    assert not list(tmp_path.iterdir())


# Picture and tool


def test_draw_digit_folders(folders):
    figure = draw_digit_folders(folders.root, "train", per_class=5)
    # 43 images: classes 0 to 2 have five of them, the others four
    assert len(figure.axes) == 43
    labels = {}
    for axes in figure.axes:
        (pixels,) = [picture.get_array() for picture in axes.images]
        if axes.texts:
            labels[axes.texts[0].get_text()] = pixels
    firsts = folders.records("train")[:10]
    assert labels.keys() == set("0123456789")
    for record in firsts:
        assert np.array_equal(labels[str(record["digit"])], np.asarray(Image.open(folders.root / record["file"])))
    boxes = [axes.get_position() for axes in figure.axes]
    assert min(box.x0 for box in boxes) > 0 and max(box.x1 for box in boxes) <= 1
    assert min(box.y0 for box in boxes) >= -1e-9 and max(box.y1 for box in boxes) <= 1
    with pytest.raises(ValueError, match="split must be one of train, val"):
        draw_digit_folders(folders.root, "test")
    with pytest.raises(ValueError, match="per_class=0; allowed"):
        draw_digit_folders(folders.root, per_class=0)


def load_tool():
    spec = importlib.util.spec_from_file_location("make_digit_scenes", ROOT / "tools" / "make_digit_scenes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tool(tmp_path, monkeypatch, capsys):
    out, picture = tmp_path / "digits", tmp_path / "pictures" / "digits.png"
    options = ["--train", "20", "--val", "10", "--size", "32", "--seed", "3", "--picture", str(picture)]
    monkeypatch.setattr(sys, "argv", ["tool", "--layout", "folders", "--out", str(out), *options])
    assert not load_tool().main()
    printed = capsys.readouterr().out
    made = DigitFolders.load(out)
    assert made.options == {"train": 20, "val": 10, "size": 32, "seed": 3, "clutter": [1, 2], "generator": 1}
    assert str(out) in printed and "images" in printed
    with Image.open(picture) as pixels:
        assert pixels.size[0] > 300 and pixels.mode == "RGB"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-digits", "3"], "--max-digits is not an option of --layout folders"),
        (["--size", "48", "64"], "--size takes one number, got 2"),
        (["--train", "5"], "train=5; allowed: an integer of 10 or more"),
        (["--layout", "coco", "--train", "0"], "train=0; allowed: an integer of 1 or more"),
    ],
)
def test_tool_refuses_in_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    out = tmp_path / "digits"
    monkeypatch.setattr(sys, "argv", ["tool", "--layout", "folders", "--out", str(out), *arguments])
    assert load_tool().main() == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize(
    ("layout", "expected"),
    [("folders", ("data/digits", 8000, 1000, [32])), ("coco", ("data/digit_scenes", 400, 80, [112]))],
)
def test_tool_defaults_are_those_of_the_layout(layout, expected):
    args = load_tool().parse_args(["--layout", layout])
    assert (args.out.as_posix(), args.train, args.val, args.size) == expected
