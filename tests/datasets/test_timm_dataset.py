"""Data sets that timm reads: folders, tar files and torchvision's, with bad files and in worker processes."""

import itertools
import logging
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.logging import MMLogger
from mmengine.registry import DATASETS as ROOT_DATASETS
from mmengine.runner import Runner
from PIL import Image

from mmbivit.datasets import TimmDataset
from mmbivit.datasets.timm_dataset import readable_names, to_rgb

EVAL = [dict(type="mmbivit.TimmTransform", input_size=16)]
CLASSES = ("10", "2", "1")


def write_image(path, seed=0, size=(20, 18), mode="RGB"):
    """Write random pixels; ``size`` is (width, height)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


def make_folder(root, classes=CLASSES, images=2):
    for i, (name, image) in enumerate(itertools.product(classes, range(images))):
        write_image(root / name / f"{image}.png", seed=i)
    return root


@pytest.fixture
def data(tmp_path) -> Path:
    make_folder(tmp_path / "train")
    return tmp_path


@pytest.fixture
def warnings_logged():
    """The messages of MMEngine's logger, at level warning."""
    messages = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = MMLogger.get_current_instance()
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


def as_table(dataset):
    """Class folder -> names of its images, read through the labels."""
    folders = dataset.metainfo["folders"]
    return sorted((folders[item["labels"]], Path(item["img_path"]).name) for item in dataset)


# Image folders


def test_reads_an_image_folder_in_natural_order(data):
    dataset = ROOT_DATASETS.build(dict(type="mmbivit.TimmDataset", data_root=str(data), pipeline=EVAL))
    assert len(dataset) == 6
    assert dataset.metainfo == dict(classes=("1", "2", "10"), folders=("1", "2", "10"))
    items = list(dataset)
    assert [item["labels"] for item in items] == [0, 0, 1, 1, 2, 2]
    expected = [str(data / "train" / name / image) for name in ("1", "2", "10") for image in ("0.png", "1.png")]
    assert [item["img_path"] for item in items] == expected
    for item in items:
        assert list(item) == ["inputs", "labels", "img_path"]
        assert type(item["labels"]) is int
        assert item["inputs"].dtype == torch.uint8
        assert item["inputs"].shape == (3, 16, 16)


def test_the_pipeline_gets_the_rgb_image(data):
    for mode in ("L", "P", "LA", "RGBA", "1"):
        write_image(data / "train" / "1" / f"{mode}.png", mode=mode)
    write_image(data / "train" / "1" / "cmyk.jpg", mode="CMYK")
    seen = []
    dataset = TimmDataset(data, pipeline=[lambda results: seen.append(dict(results)) or dict(results, inputs=0)])
    items = list(dataset)
    assert all(image["img"].mode == "RGB" for image in seen)
    for image, item in zip(seen, items, strict=True):
        assert set(image) == {"img", "labels", "img_path"}
        expected = Image.open(item["img_path"]).convert("RGB")
        assert np.array_equal(np.asarray(image["img"]), np.asarray(expected))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bits_become_the_upper_8(data, kind):
    pixels = np.arange(20 * 18, dtype=np.uint16).reshape(18, 20) * 180
    assert pixels.max() > 2**15
    Image.fromarray(pixels).save(data / "train" / "1" / "0.png", kind)
    image = TimmDataset(data, pipeline=[lambda results: dict(results, inputs=results["img"])])[0]["inputs"]
    assert np.array_equal(np.asarray(image), np.broadcast_to((pixels >> 8)[..., None], (18, 20, 3)))


def test_16_bits_as_early_pillow_reads_them():
    image = Image.fromarray(np.array([[0, 255, 256, 65535]], dtype=np.int32))
    assert image.mode == "I"
    image.format = "PNG"
    assert np.asarray(to_rgb(image))[0, :, 0].tolist() == [0, 0, 1, 255]


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_32_bits_are_refused(data, dtype):
    Image.fromarray(np.ones((8, 8), dtype=dtype)).save(data / "train" / "1" / "0.png", "TIFF")
    with pytest.raises(ValueError, match="0.png cannot be decoded .it has 32 bits per pixel, allowed are 8 and 16"):
        TimmDataset(data, pipeline=EVAL)[0]


@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (1, 4000), (4000, 1)])
def test_tiny_and_thin_images(data, size, is_training):
    write_image(data / "train" / "1" / "0.png", size=size)
    pipeline = [dict(type="mmbivit.TimmTransform", input_size=16, is_training=is_training)]
    assert TimmDataset(data, pipeline=pipeline)[0]["inputs"].shape == (3, 16, 16)


def test_names_classes_of_imagenet():
    folders = ("n01440764", "n02012849", "n03126707", "n99999999", "cat")
    names = ("tench", "crane (n02012849)", "crane (n03126707)", "n99999999", "cat")
    assert readable_names(folders) == names


def test_metainfo_has_readable_names(tmp_path):
    make_folder(tmp_path / "val", ("n01443537", "n01440764"), 1)
    dataset = TimmDataset(tmp_path, "val", pipeline=EVAL)
    assert dataset.metainfo == dict(classes=("tench", "goldfish"), folders=("n01440764", "n01443537"))


@pytest.mark.parametrize("as_file", [False, True])
def test_class_map_chooses_labels_and_leaves_classes_out(data, as_file):
    class_map = {"10": 0, "1": 1}
    if as_file:
        (data / "train" / "classes.txt").write_text("10\n1\n\n")
        class_map = "classes.txt"
    dataset = TimmDataset(data, pipeline=EVAL, class_map=class_map)
    assert dataset.metainfo["folders"] == ("10", "1")
    assert as_table(dataset) == [("1", "0.png"), ("1", "1.png"), ("10", "0.png"), ("10", "1.png")]


def test_class_map_may_leave_labels_out_and_join_classes(data):
    dataset = TimmDataset(data, pipeline=EVAL, class_map={"1": 2, "2": 0, "10": 2})
    assert dataset.metainfo["classes"] == ("2", "unused_1", "1/10")
    assert sorted(item["labels"] for item in dataset) == [0, 0, 2, 2, 2, 2]


@pytest.mark.parametrize(
    ("class_map", "message"),
    [({"1": -1}, "no integers of 0 or more"), ({"1": "a"}, "no integers"), ("none.txt", "Cannot locate")],
)
def test_refuses_wrong_class_maps(data, class_map, message):
    with pytest.raises(ValueError, match=message):
        TimmDataset(data, class_map=class_map)


@pytest.mark.parametrize(("folder", "split"), [("validation", "val"), ("val", "validation"), ("training", "train")])
def test_finds_splits_by_timms_synonyms(tmp_path, folder, split):
    make_folder(tmp_path / folder)
    make_folder(tmp_path / "other", ("a", "b"))
    assert TimmDataset(tmp_path, split).metainfo["folders"] == ("1", "2", "10")


def test_without_split_the_classes_are_in_the_root(data):
    assert len(TimmDataset(data / "train", split="")) == 6


@pytest.mark.parametrize("split", ["val", "test"])
def test_does_not_fall_back_to_the_root(data, split):
    with pytest.raises(FileNotFoundError) as error:
        TimmDataset(data, split)
    assert f"no {data / split};" in str(error.value)
    assert str(data / split / "<class>" / "<image>") in str(error.value)
    assert "split=''" in str(error.value)


def test_says_what_is_missing_in_an_empty_folder(tmp_path):
    (tmp_path / "train" / "cat").mkdir(parents=True)
    (tmp_path / "train" / "cat" / "notes.txt").touch()
    with pytest.raises(FileNotFoundError, match=r"no images \(.*\.png.*<class>.<image>"):
        TimmDataset(tmp_path)
    make_folder(tmp_path / "train")
    with pytest.raises(FileNotFoundError, match=r"no images .* class_map \(dog"):
        TimmDataset(tmp_path, class_map={"dog": 0})


def test_refuses_images_outside_class_folders(data):
    write_image(data / "train" / "preview.png")
    with pytest.raises(ValueError, match="images in no class folder"):
        TimmDataset(data)


def test_refuses_hidden_folders(data):
    write_image(data / "train" / ".cache" / "0.png")
    with pytest.raises(ValueError, match=r"hidden folder '\.cache'"):
        TimmDataset(data)


def test_refuses_the_layout_of_the_tiny_imagenet_download(tmp_path):
    for wnid in ("n01443537", "n01440764"):
        write_image(tmp_path / "train" / wnid / "images" / "0.png")
    with pytest.raises(ValueError, match="folders called 'images', which is only one class"):
        TimmDataset(tmp_path)


def test_refuses_classes_without_an_order(tmp_path):
    make_folder(tmp_path / "train", ("1", "01"))
    with pytest.raises(ValueError, match="have no order in timm's sorting"):
        TimmDataset(tmp_path)


@pytest.mark.parametrize("name", ["tfds/mnist", "wds/imagenet", "hfids/imagenet", "TFDS/mnist"])
def test_refuses_streamed_data_sets(data, name):
    with pytest.raises(ValueError, match="streamed: it has neither length nor index"):
        TimmDataset(data, name=name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(name="imagenet"), "name='imagenet'; allowed"),
        (dict(name="torch/nothing"), "Unknown torchvision dataset"),
        (dict(name="torch/cifar10", class_map={"cat": 0}), "class_map=.*has its own classes"),
        (dict(ann_file="train.txt"), "ann_file"),
        (dict(is_training=True, seed=1), "no options is_training, seed"),
    ],
)
def test_refuses_unknown_settings(data, options, message):
    with pytest.raises(ValueError, match=message):
        TimmDataset(data, **options)


def test_the_pipeline_must_make_inputs(data):
    with pytest.raises(ValueError, match="no 'inputs': end it with .*mmbivit.TimmTransform"):
        TimmDataset(data)[0]


# Files that are no images


def spoil(path, how):
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-300])
    else:
        path.write_bytes(b"no image" if how == "text" else b"")


@pytest.mark.parametrize("how", ["truncated", "text", "empty"])
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_names_the_image_that_cannot_be_decoded(data, how, suffix):
    path = write_image(data / "train" / "1" / f"bad.{suffix}", size=(60, 50))
    spoil(path, how)
    dataset = TimmDataset(data, pipeline=EVAL)
    index = [Path(path).stem for path, _ in dataset._reader.samples].index("bad")
    with pytest.raises(ValueError, match="skip_corrupt=True in the data set, which skips") as error:
        dataset[index]
    assert str(path) in str(error.value)


def test_skips_what_cannot_be_decoded_and_warns_once(data, warnings_logged):
    bad = [data / "train" / "10" / name for name in ("0.png", "1.png")]
    for path, how in zip(bad, ("truncated", "text"), strict=True):
        spoil(path, how)
    dataset = TimmDataset(data, pipeline=EVAL, skip_corrupt=True)
    for _ in range(2):
        items = list(dataset)
        assert [item["labels"] for item in items] == [0, 0, 1, 1, 0, 0]  # the next readable one is the first
        assert {item["img_path"] for item in items[4:]} == {str(data / "train" / "1" / "0.png")}
    assert [message.split(",")[0] for message in warnings_logged] == [f"Skipped {path}" for path in bad]


@pytest.mark.parametrize("images", [1, 5])
def test_gives_up_when_nothing_can_be_decoded(tmp_path, images):
    for path in make_folder(tmp_path / "train", images=images).rglob("*.png"):
        spoil(path, "text")
    dataset = TimmDataset(tmp_path, pipeline=EVAL, skip_corrupt=True)
    with pytest.raises(ValueError, match=f"{min(10, 3 * images)} images in a row cannot be decoded"):
        dataset[0]


def test_a_missing_file_is_not_a_corrupt_one(data):
    dataset = TimmDataset(data, pipeline=EVAL, skip_corrupt=True)
    (data / "train" / "1" / "0.png").unlink()
    with pytest.raises(FileNotFoundError, match="0.png"):
        dataset[0]


def test_errors_of_the_pipeline_are_not_taken_for_corrupt_images(data):
    def fail(results):
        raise RuntimeError("a mistake")

    with pytest.raises(RuntimeError, match="a mistake"):
        TimmDataset(data, pipeline=[fail], skip_corrupt=True)[0]


# Tar files, torchvision


def make_tar(path, folder, prefix=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for file in sorted(folder.rglob("*.png")):
            tar.add(file, prefix + file.relative_to(folder).as_posix())


def make_tars(data, layout):
    """Pack the folder ``train`` in one of the ways that are documented; return the data root."""
    root = data / "tars"
    if layout == "one tar per class":
        for folder in (data / "train").iterdir():
            make_tar(root / "train" / f"{folder.name}.tar", folder)
    else:
        make_tar(root / "train.tar", data / "train", prefix="./" if layout == "with ./" else "")
    return root / "train.tar" if layout == "a file" else root


@pytest.mark.parametrize("layout", ["a file", "a file in data_root", "with ./", "one tar per class"])
def test_reads_tar_files(data, layout):
    folder = TimmDataset(data, pipeline=EVAL)
    dataset = TimmDataset(make_tars(data, layout), pipeline=EVAL)
    assert dataset.metainfo == folder.metainfo
    assert as_table(dataset) == as_table(folder)
    assert all(Path(item["img_path"]).suffix == ".png" and ".tar" in item["img_path"] for item in dataset)
    by_label = lambda item: (item["labels"], Path(item["img_path"]).name)  # noqa: E731
    pairs = zip(sorted(dataset, key=by_label), sorted(folder, key=by_label), strict=True)
    assert all(torch.equal(one["inputs"], other["inputs"]) for one, other in pairs)


def test_unpacked_tar_files_are_left_alone(data):
    make_tar(data / "train" / "1.tar", data / "train" / "1")
    assert len(TimmDataset(data)) == 6


def test_names_a_corrupt_image_in_a_tar(data, warnings_logged):
    spoil(data / "train" / "1" / "0.png", "text")
    root = make_tars(data, "one tar per class")
    path = str(root / "train" / "1.tar" / "0.png")
    dataset = TimmDataset(root, pipeline=EVAL)
    index = dataset._reader.targets.tolist().index(0)
    with pytest.raises(ValueError, match="skip_corrupt=True") as error:
        [dataset[i] for i in (index, *range(len(dataset)))]
    assert path in str(error.value)
    assert len(list(TimmDataset(root, pipeline=EVAL, skip_corrupt=True))) == 6
    assert len(warnings_logged) == 1


def test_says_when_a_tar_is_none_or_empty(tmp_path):
    (tmp_path / "train.tar").write_bytes(b"no tar")
    with pytest.raises(ValueError, match="train.tar cannot be read as tar"):
        TimmDataset(tmp_path)
    make_tar(tmp_path / "val.tar", tmp_path)
    with pytest.raises(FileNotFoundError, match="no images .* in .*val.tar; expected"):
        TimmDataset(tmp_path, "val")


def write_mnist(root, train=4, test=2):
    """Write MNIST's four files: big-endian headers, then pixels or labels."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for prefix, count in (("train", train), ("t10k", test)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        header = np.array([0x803, count, 28, 28], ">i4").tobytes()
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        header = np.array([0x801, count], ">i4").tobytes()
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(header + bytes(range(9, 9 - count, -1)))


def test_reads_data_sets_of_torchvision(tmp_path):
    write_mnist(tmp_path)
    dataset = TimmDataset(tmp_path, "train", name="torch/mnist", pipeline=EVAL)
    items = list(dataset)
    assert [item["labels"] for item in items] == [9, 8, 7, 6]
    assert items[3]["img_path"] == "torch/mnist/train[3]"
    assert torch.equal(items[0]["inputs"][0], items[0]["inputs"][2])
    assert dataset.metainfo["classes"][9] == "9 - nine"
    assert len(TimmDataset(tmp_path, "val", name="torch/mnist")) == 2
    with pytest.raises(ValueError, match="split='trian'"):
        TimmDataset(tmp_path, "trian", name="torch/mnist")


def test_says_when_data_of_torchvision_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="torch/cifar10 is not in data_root=.*download=True"):
        TimmDataset(tmp_path, name="torch/cifar10")


def test_reads_torchvisions_image_folder(data, warnings_logged):
    dataset = TimmDataset(data, name="torch/image_folder", pipeline=EVAL)
    assert dataset.metainfo["folders"] == ("1", "10", "2")  # torchvision's order
    assert as_table(dataset) == as_table(TimmDataset(data, pipeline=EVAL))
    with pytest.raises(FileNotFoundError, match="expected the tree"):
        TimmDataset(data, "val", name="torch/image_folder")
    spoil(data / "train" / "2" / "1.png", "truncated")
    with pytest.raises(ValueError, match="2.1.png cannot be decoded"):
        dataset[5]
    assert TimmDataset(data, name="torch/image_folder", pipeline=EVAL, skip_corrupt=True)[5]["labels"] == 0
    assert len(warnings_logged) == 1


# With workers


def build_loader(data_root, **options):
    return Runner.build_dataloader(
        dict(
            batch_size=2,
            num_workers=2,
            collate_fn=dict(type="default_collate"),
            sampler=dict(type="DefaultSampler", shuffle=False),
            dataset=dict(type="mmbivit.TimmDataset", data_root=str(data_root), pipeline=EVAL, **options),
        ),
        seed=0,
    )


@pytest.mark.parametrize("layout", ["folder", "a file", "one tar per class"])
def test_worker_processes_read_the_same(data, layout):
    loader = build_loader(data if layout == "folder" else make_tars(data, layout))
    items = list(loader.dataset)  # opens the tar files in this process first
    batches = list(loader)
    assert [batch["inputs"].shape for batch in batches] == [(2, 3, 16, 16)] * 3
    assert batches[0]["inputs"].dtype == torch.uint8
    assert batches[0]["labels"].dtype == torch.int64
    assert torch.equal(torch.cat([batch["inputs"] for batch in batches]), torch.stack([i["inputs"] for i in items]))
    assert torch.cat([batch["labels"] for batch in batches]).tolist() == [item["labels"] for item in items]
    assert sum((batch["img_path"] for batch in batches), []) == [item["img_path"] for item in items]


def test_workers_share_what_they_have_reported(data):
    spoil(data / "train" / "1" / "0.png", "text")
    loader = build_loader(data, skip_corrupt=True)
    list(loader)
    assert loader.dataset._reported.tolist() == [True] + [False] * 5
