"""Tiny-ImageNet ends in class folders that timm and torchvision label rightly, whatever happens on the way."""

import os
import runpy
import shutil
import sys
from pathlib import Path

import pytest
from timm.data import create_dataset
from torchvision.datasets import ImageFolder

from mmbivit.datasets import tiny_imagenet
from mmbivit.datasets.tiny_imagenet import convert_tiny_imagenet

ROOT = Path(__file__).parents[2]
WNIDS = ("n02124075", "n04067472", "n01443537")  # not in order, as in the official file
COUNTS = {"train": 3, "val": 2}
VAL_CLASSES = {f"val_{i}.JPEG": WNIDS[(i + 1) % 3] for i in range(6)}


@pytest.fixture
def official(tmp_path) -> Path:
    """The archive's tree, small; each file's content is its name, so that a mix-up shows."""
    root = tmp_path / "tiny-imagenet-200"
    for wnid in WNIDS:
        (root / "train" / wnid / "images").mkdir(parents=True)
        for i in range(3):
            (root / "train" / wnid / "images" / f"{wnid}_{i}.JPEG").write_text(f"{wnid}_{i}")
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t0\t10\t10\n")
    for split in ("val", "test"):
        (root / split / "images").mkdir(parents=True)
        for i in range(6):
            (root / split / "images" / f"{split}_{i}.JPEG").write_text(f"{split}_{i}")
    rows = [f"{name}\t{wnid}\t0\t32\t44\t62\n" for name, wnid in VAL_CLASSES.items()]
    (root / "val" / "val_annotations.txt").write_text("".join(rows))
    (root / "wnids.txt").write_text("\n".join(WNIDS) + "\n")
    (root / "words.txt").write_text("n01443537\tgoldfish, Carassius auratus\n")
    return root


def convert(root: Path, out: Path | None = None) -> Path:
    return convert_tiny_imagenet(root, out, num_classes=3, counts=COUNTS)


def files(root: Path) -> dict[str, str]:
    return {path.relative_to(root).as_posix(): path.read_text() for path in root.rglob("*") if path.is_file()}


def expected(before: dict[str, str], only_classes: bool = False) -> dict[str, str]:
    """Files after the conversion, from the files before it."""
    after = {}
    for path, content in before.items():
        parts = path.split("/")
        if parts[0] == "train" and "images" in parts:
            after["/".join([*parts[:2], parts[3]])] = content
        elif parts[:2] == ["val", "images"]:
            after[f"val/{VAL_CLASSES[parts[2]]}/{parts[2]}"] = content
        elif not only_classes or parts[0] in ("wnids.txt", "words.txt"):
            after[path] = content
    return after


def check_labels(root: Path) -> None:
    for split in ("train", "val"):
        reader = create_dataset("", str(root), split=split).reader
        assert reader.class_to_idx == {wnid: i for i, wnid in enumerate(sorted(WNIDS))}
        samples = [(Path(path).name, sorted(WNIDS)[label]) for path, label in reader.samples]
        truth = VAL_CLASSES if split == "val" else {f"{wnid}_{i}.JPEG": wnid for wnid in WNIDS for i in range(3)}
        assert dict(samples) == truth and len(samples) == len(truth)
        # torchvision takes the outermost folder for the class, and stumbles over an empty one.
        other = ImageFolder(str(root / split))
        assert sorted(other.samples) == sorted(reader.samples)


def test_timm_mislabels_the_official_tree(official):
    # What makes the conversion necessary, for train as well.
    for split in ("train", "val"):
        assert create_dataset("", str(official), split=split).reader.class_to_idx == {"images": 0}


def test_in_place(official):
    before = files(official)
    assert convert(official) == official
    assert files(official) == expected(before)
    check_labels(official)
    convert(official)
    assert files(official) == expected(before)


@pytest.mark.parametrize("hard_links", [True, False])
def test_into_another_folder(official, tmp_path, monkeypatch, hard_links):
    if not hard_links:

        def no_link(*_):
            raise OSError("Invalid cross-device link")

        monkeypatch.setattr(os, "link", no_link)
    before, out = files(official), tmp_path / "new" / "tiny"
    for _ in range(2):
        convert(official, out)
        assert files(official) == before
        assert files(out) == expected(before, only_classes=True)
    check_labels(out)
    name = f"{WNIDS[0]}_0.JPEG"
    same = (out / "train" / WNIDS[0] / name).samefile(official / "train" / WNIDS[0] / "images" / name)
    assert same == hard_links
    convert(out)  # it is a Tiny-ImageNet of its own


def interrupt_after(monkeypatch, name: str, calls: int):
    """Let a function of ``os`` fail after some calls, as a kill would."""
    original, done = getattr(os, name), []

    def function(*args):
        if len(done) == calls:
            raise KeyboardInterrupt
        done.append(args)
        return original(*args)

    monkeypatch.setattr(os, name, function)


@pytest.mark.parametrize("calls", [0, 1, 4, 9, 11, 14])
def test_interrupted_in_place(official, monkeypatch, calls):
    before = files(official)
    with monkeypatch.context() as patch:
        interrupt_after(patch, "replace", calls)
        with pytest.raises(KeyboardInterrupt):
            convert(official)
    assert sorted(files(official).values()) == sorted(before.values())  # nothing is lost or doubled
    convert(official)
    assert files(official) == expected(before)
    check_labels(official)


def test_interrupted_while_tidying_up(official, monkeypatch):
    before = files(official)
    with monkeypatch.context() as patch:
        patch.setattr(tiny_imagenet, "_remove_empty", lambda *_: sys.exit(1))
        with pytest.raises(SystemExit):
            convert(official)
    assert (official / "val/images").is_dir()
    convert(official)
    assert files(official) == expected(before)
    check_labels(official)


@pytest.mark.parametrize("calls", [0, 5, 12, 16])
def test_interrupted_copies(official, tmp_path, monkeypatch, calls):
    before, out = files(official), tmp_path / "out"

    def no_link(*_):
        raise OSError("Operation not permitted")

    monkeypatch.setattr(os, "link", no_link)
    with monkeypatch.context() as patch:
        interrupt_after(patch, "replace", calls)  # between the copy and its final name
        with pytest.raises(KeyboardInterrupt):
            convert(official, out)
    convert(official, out)
    assert files(out) == expected(before, only_classes=True)
    assert files(official) == before


def test_out_from_half_converted(official, tmp_path, monkeypatch):
    before, out = files(official), tmp_path / "out"
    with monkeypatch.context() as patch:
        interrupt_after(patch, "replace", 10)
        with pytest.raises(KeyboardInterrupt):
            convert(official)
    convert(official, out)
    assert files(out) == expected(before, only_classes=True)


def test_other_scripts_layout_of_val(official):
    # Widespread scripts sort into val/<wnid>/images and drop the annotations.
    before = expected(files(official))
    convert(official)
    for wnid in WNIDS:
        folder = official / "val" / wnid
        folder.rename(official / "val" / "images")
        folder.mkdir()
        (official / "val" / "images").rename(folder / "images")
    (official / "val/val_annotations.txt").unlink()
    del before["val/val_annotations.txt"]
    convert(official)
    assert files(official) == before


def test_archive_extracted_again(official, tmp_path):
    before = files(official)
    shutil.copytree(official, tmp_path / "again")
    convert(official)
    shutil.copytree(tmp_path / "again", official, dirs_exist_ok=True)
    convert(official)
    assert files(official) == expected(before)


def test_different_files_for_one_place(official, tmp_path):
    name = f"{WNIDS[1]}_2.JPEG"
    (official / "train" / WNIDS[1] / name).write_text("another")
    before = files(official)
    for out in (None, tmp_path / "out"):
        with pytest.raises(ValueError, match=f"{name} are different, but both belong to"):
            convert(official, out)
    assert files(official) == before and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (f"train/{WNIDS[1]}/images/{WNIDS[1]}_1.JPEG", rf"train: class {WNIDS[1]} has 2 images instead of 3\. Extract"),
        ("val/images/val_1.JPEG", rf"val: class {WNIDS[2]} has 1 images instead of 2\. Extract"),
    ],
)
def test_missing_image(official, path, message):
    (official / path).unlink()
    before = files(official)
    with pytest.raises(ValueError, match=message):
        convert(official)
    assert files(official) == before


def test_official_numbers_are_the_default(official):
    with pytest.raises(ValueError, match=r"wnids.txt names 3 classes instead of 200"):
        convert_tiny_imagenet(official)
    with pytest.raises(ValueError, match=f"class {WNIDS[0]} has 3 images instead of 500, and 2 more classes are wrong"):
        convert_tiny_imagenet(official, num_classes=3)


def test_unknown_class_folder(official):
    (official / "train/n00000000").mkdir()
    (official / "train/n00000000/x.JPEG").write_text("x")
    with pytest.raises(ValueError, match="no classes of wnids.txt: n00000000"):
        convert(official)
    assert (official / "train/n00000000/x.JPEG").read_text() == "x"


def test_annotations(official):
    path = official / "val/val_annotations.txt"
    content = path.read_text()
    path.write_text(content.replace("val_3.JPEG", "val_99.JPEG"))
    with pytest.raises(ValueError, match=r"names no class of wnids.txt for .*val_3.JPEG"):
        convert(official)
    path.write_text(content.replace("\t", " "))
    with pytest.raises(ValueError, match="has a line without tabs: 'val_0.JPEG n04067472"):
        convert(official)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="val_annotations.txt is missing"):
        convert(official)


def test_links_are_not_moved(official, tmp_path):
    name = "val/images/val_0.JPEG"
    (official / name).rename(tmp_path / "stored")
    (official / name).symlink_to("../../../stored")
    with pytest.raises(ValueError, match=r"val_0.JPEG is a link, .*--out"):
        convert(official)
    convert(official, tmp_path / "out")
    assert (tmp_path / "out/val" / VAL_CLASSES["val_0.JPEG"] / "val_0.JPEG").read_text() == "val_0"


def test_wrong_folder(official):
    with pytest.raises(FileNotFoundError, match="has no wnids.txt, train, val. Expected:") as error:
        convert(official.parent)
    assert "│       └── images/" in str(error.value)
    assert str(error.value).endswith(f"It is probably {official}")
    with pytest.raises(FileNotFoundError, match=r"unzip -q .*\.zip"):
        convert(official.parent / "tiny-imagenet-200.zip")


def test_tool(official, monkeypatch, capsys):
    def run(*args: object) -> int:
        tool = ROOT / "tools/dataset_converters/tiny_imagenet.py"
        monkeypatch.setattr(sys, "argv", [str(tool), *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(tool), run_name="__main__")
        return stop.value.code

    assert run(official) == 1
    assert capsys.readouterr().err.startswith(f"error: {official / 'wnids.txt'} names 3 classes")
    monkeypatch.setitem(convert_tiny_imagenet.__kwdefaults__, "num_classes", 3)
    monkeypatch.setattr(tiny_imagenet, "OFFICIAL_COUNTS", COUNTS)
    monkeypatch.setattr(tiny_imagenet, "NUM_CLASSES", 3)
    assert run(official, "--out", official / "out") == 0
    assert "3 classes with 3 train and 2 val images each" in capsys.readouterr().out
