"""Image folders that are missing, laid out otherwise or do not fit the model are found before the run."""

import copy
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from mmengine.config import Config
from PIL import Image

from mmbivit.datasets import TimmDataset, check_image_data, set_data_root

ROOT = "data/pets"


def make_config(root: str = ROOT, num_classes: int = 3, input_size: object = 64, **options) -> Config:
    def loader(split: str) -> dict:
        pipeline = [{"type": "mmbivit.TimmTransform", "input_size": input_size}]
        dataset = {"type": "mmbivit.TimmDataset", "data_root": root, "split": split, "pipeline": pipeline}
        return {"batch_size": 2, "dataset": dataset | copy.deepcopy(options)}

    backbone = {"type": "mmbivit.BinarySwinTransformer", "arch": "tiny"}
    return Config(
        {
            "data_root": root,
            "train_dataloader": loader("train"),
            "val_dataloader": loader("val"),
            "test_dataloader": loader("val"),
            "model": {"type": "mmbivit.ImageClassifier", "num_classes": num_classes, "backbone": backbone},
        }
    )


def make_images(*paths: str) -> None:
    for path in paths:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)


def make_classes(folder: str, classes=("cat", "dog", "owl")) -> None:
    make_images(*(f"{folder}/{name}/{i}.png" for name in classes for i in range(2)))


@pytest.fixture(autouse=True)
def workdir(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def pets() -> None:
    make_classes(f"{ROOT}/train")
    make_classes(f"{ROOT}/val")


def message_of(cfg: Config, *args) -> str:
    with pytest.raises(FileNotFoundError) as error:
        check_image_data(cfg, *args)
    return str(error.value)


def test_skipping_corrupt_images_is_for_training(pets):
    cfg = make_config(skip_corrupt=True)
    check_image_data(cfg, ("train",))
    for mode in ("val", "test"):
        message = f"^{mode}_dataloader.dataset.skip_corrupt=True would count the image after a corrupt one twice"
        with pytest.raises(ValueError, match=message):
            check_image_data(cfg, ("train", mode))
        cfg[f"{mode}_dataloader"].dataset.skip_corrupt = False
    check_image_data(cfg)
    cfg.val_dataloader.dataset = dict(type="RepeatDataset", times=2, dataset=cfg.train_dataloader.dataset)
    with pytest.raises(ValueError, match="^val_dataloader"):
        check_image_data(cfg)


# What is missing


def test_one_error_with_everything(workdir):
    assert message_of(make_config("data/imagenet")) == (
        f"""\
The data of this config is incomplete:
  data/imagenet/train/ is missing
  data/imagenet/val/ is missing

Expected (relative to {workdir}):
  data/imagenet/
  ├── train/  <- missing
  │   └── <class>/
  │       └── <image>.JPEG, .jpg or .png
  └── val/  <- missing
      └── <class>/
          └── <image>.JPEG, .jpg or .png

What to do:
  - The data is in another folder: pass it to tools/train.py or tools/test.py as --data-root DIR,
    or link it: ln -s DIR data/imagenet
  - ImageNet: extract the official archives into
    data/imagenet/train/<wnid>/ and data/imagenet/val/<wnid>/"""
    )


def test_nothing_wrong(pets):
    check_image_data(make_config())
    check_image_data(make_config(input_size=[32, 48]))
    for split in ("train", "val"):
        TimmDataset(ROOT, split)  # agrees


def test_hint_of_the_config():
    cfg = make_config()
    cfg.data_hint = "python tools/make_pets.py"
    message = message_of(cfg)
    assert "  - Make or convert the data:\n    python tools/make_pets.py" in message
    assert "ImageNet" not in message
    cfg.model.num_classes = 1000
    assert "  - ImageNet: extract" in message_of(cfg)


def test_only_the_modes_asked_for():
    make_classes(f"{ROOT}/val")
    check_image_data(make_config(), ("test",))
    message = message_of(make_config())
    assert f"  {ROOT}/train/ is missing\n\n" in message and "ln -s" not in message
    with pytest.raises(ValueError, match="got testing"):
        check_image_data(make_config(), ("testing",))


def test_timms_synonyms(pets):
    Path(ROOT, "val").rename(Path(ROOT, "validation"))
    Path(ROOT, "train").rename(Path(ROOT, "training"))
    check_image_data(make_config())


def test_data_root_itself_is_no_split():
    # timm would read it, and validate on the training images.
    make_classes(ROOT)
    assert "train/ is missing\n  data/pets/val/ is missing" in message_of(make_config())
    with pytest.raises(FileNotFoundError):
        TimmDataset(ROOT, "val")
    check_image_data(make_config(split=""))


def test_class_folders_without_images(pets):
    for path in Path(ROOT, "train").rglob("*.png"):
        path.rename(path.with_suffix(".txt"))
    message = message_of(make_config())
    assert f"{ROOT}/train/ has no class folders with images\n\n" in message
    assert "├── train/  <- without class folders" in message
    check_image_data(make_config(input_key=".txt;.png"))


def test_image_net_validation_as_extracted():
    make_classes("data/imagenet/train", ("n01440764", "n01443537", "n01484850"))
    make_images(*(f"data/imagenet/val/ILSVRC2012_val_0000000{i}.JPEG" for i in range(1, 4)))
    message = message_of(make_config("data/imagenet"))
    assert "data/imagenet/val/ has 3 images beside class folders instead of inside them\n\n" in message
    assert "  - Move the images into class folders, data/imagenet/val/<class>/." in message
    assert "valprep.sh" in message and "--data-root" not in message


def test_image_beside_class_folders(pets):
    # One stray picture would be a class of its own and shift the labels of all others; not with a class_map.
    make_images(f"{ROOT}/train/montage.png")
    assert f"{ROOT}/train/ has 1 images beside class folders" in message_of(make_config())
    check_image_data(make_config(class_map={"cat": 0, "dog": 1, "owl": 2}))


@pytest.mark.parametrize("half", [False, True])
def test_tiny_imagenet_as_extracted(half):
    for name in ("a", "b", "c"):
        is_done = half and name == "a"
        make_images(f"{ROOT}/train/{name}/{'' if is_done else 'images/'}{name}_0.JPEG")
        Path(ROOT, "train", name, f"{name}_boxes.txt").write_text("")
    make_images(f"{ROOT}/val/images/val_0.JPEG", *([f"{ROOT}/val/a/val_1.JPEG"] if half else []))
    Path(ROOT, "val/val_annotations.txt").write_text("")
    cfg = make_config()
    cfg.data_hint = "python tools/dataset_converters/tiny_imagenet.py data/tiny-imagenet-200"
    message = message_of(cfg)
    for split in ("train", "val"):
        assert f"{ROOT}/{split}/ is as the archive of Tiny-ImageNet extracts" in message
    assert message.endswith(
        f"What to do:\n  - Make or convert the data:\n    python tools/dataset_converters/tiny_imagenet.py {ROOT}"
    )


def test_wrappers(pets):
    cfg = make_config()
    dataset = cfg.train_dataloader.dataset.to_dict() | {"type": "TimmDataset", "data_root": "elsewhere"}
    cfg.train_dataloader.dataset = {
        "type": "RepeatDataset",
        "dataset": {"type": "ConcatDataset", "datasets": [dataset]},
    }
    message = message_of(cfg)
    assert "elsewhere/train/ is missing" in message and f"  {ROOT}/\n  └── val/\n" in message
    set_data_root(cfg, ROOT)
    check_image_data(cfg)


def test_tar_files(pets):
    def pack(tar: str, folder: str, name: str) -> None:
        with tarfile.open(tar, "w") as archive:
            archive.add(folder, name)

    pack("pets.tar", f"{ROOT}/train", "")
    check_image_data(make_config("pets.tar", num_classes=7))
    message = message_of(make_config("dogs.tar"))
    assert message.startswith("The data of this config is incomplete:\n  dogs.tar is missing\n\nWhat to do:")
    # A tar file for each split, or for each class
    Path("packed/train").mkdir(parents=True)
    pack("packed/val.tar", f"{ROOT}/val", "")
    for name in ("cat", "dog", "owl"):
        pack(f"packed/train/{name}.tar", f"{ROOT}/train/{name}", name)
    check_image_data(make_config("packed", num_classes=7))
    Path("packed/val.tar").unlink()
    message = message_of(make_config("packed"))
    assert "  packed/val/ is missing" in message


def test_torchvision_and_others():
    assert "  data/pets is missing\n" in message_of(make_config(name="torch/cifar10"))
    check_image_data(make_config(name="torch/cifar10", download=True))
    Path(ROOT).mkdir(parents=True)
    check_image_data(make_config(name="torch/cifar10", num_classes=7))
    check_image_data(make_config("nowhere", name="hfds/pets"))
    check_image_data(make_config("s3://bucket/pets"))
    check_image_data(Config({"train_dataloader": {"dataset": {"type": "CocoDataset", "data_root": "nowhere"}}}))
    check_image_data(Config({"train_dataloader": None}))


# What does not fit


def test_different_classes(pets):
    make_classes(f"{ROOT}/train", [f"breed{i}" for i in range(12)])
    Path(ROOT, "val/dog").rename(Path(ROOT, "val/hund"))
    with pytest.raises(ValueError) as error:
        check_image_data(make_config(num_classes=15))
    assert str(error.value) == (
        "data/pets/train has 15 classes, data/pets/val has 3; only data/pets/train has 'breed0', 'breed1', 'breed2', "
        "'breed3', 'breed4' and 8 more; only data/pets/val has 'hund'. "
        "Make the class folders the same, or give both datasets a class_map"
    )


def test_empty_class_folder_shifts_labels(pets):
    for image in Path(ROOT, "val/cat").iterdir():
        image.unlink()
    with pytest.raises(ValueError, match="only data/pets/train has 'cat'. Make"):
        check_image_data(make_config())


def test_class_maps(pets):
    Path(ROOT, "val/dog").rename(Path(ROOT, "val/hund"))
    check_image_data(make_config(class_map={"cat": 0, "dog": 1, "hund": 1, "owl": 2}))
    Path(ROOT, "val/hund").rename(Path(ROOT, "val/dog"))
    cfg = make_config()
    cfg.train_dataloader.dataset.class_map = {"cat": 0, "dog": 1, "owl": 2}
    check_image_data(cfg)
    cfg.train_dataloader.dataset.class_map = {"cat": 1, "dog": 0, "owl": 2}
    with pytest.raises(ValueError, match="only one of them has a class_map, and it numbers them differently"):
        check_image_data(cfg)
    # Files are read as timm reads them: from the working folder, else from that of the split.
    Path("classes.txt").write_text("dog\nowl\n")
    with pytest.raises(ValueError, match=r"train has 2 classes, but model.num_classes=3"):
        check_image_data(make_config(class_map="classes.txt"))
    check_image_data(make_config(class_map="classes.txt", num_classes=2))
    with pytest.raises(ValueError, match="class_map='none.txt'"):
        check_image_data(make_config(class_map="none.txt"))


def test_number_of_classes(pets):
    with pytest.raises(ValueError, match=r"^data/pets/train has 3 classes, but .*=10: set model.num_classes=3, or"):
        check_image_data(make_config(num_classes=10))
    with pytest.raises(ValueError, match=r"^data/pets/val has 3 classes, but model.num_classes=10"):
        check_image_data(make_config(num_classes=10), ("test",))
    # Evaluation on some of the classes that the model knows
    class_map = {"cat": 3, "dog": 7, "owl": 5}
    check_image_data(make_config(num_classes=10, class_map=class_map), ("test",))
    with pytest.raises(ValueError, match="val has 8 classes"):
        check_image_data(make_config(num_classes=7, class_map=class_map), ("test",))
    cfg = make_config(num_classes=10)
    cfg.model.type = "OtherClassifier"
    check_image_data(cfg)


def test_folders_inside_class_folders(pets):
    # timm takes the innermost folder for the class, so a shallow look does not know the classes.
    Path(ROOT, "train/birds").mkdir()
    Path(ROOT, "train/owl").rename(Path(ROOT, "train/birds/owl"))
    check_image_data(make_config())


@pytest.mark.parametrize(
    ("backbone", "smallest"),
    [
        ({}, 32),
        ({"arch": "small"}, 32),
        ({"arch": {"embed_dims": 8, "depths": [1, 1], "num_heads": [1, 1]}, "patch_size": 2, "out_indices": [1]}, 4),
    ],
)
def test_input_size(pets, backbone, smallest):
    def config(size: object) -> Config:
        cfg = make_config(input_size=size)
        cfg.model.backbone.update(backbone)
        return cfg

    check_image_data(config(smallest))
    with pytest.raises(ValueError, match=rf"input_size={smallest - 1} .* Set input_size to {smallest} or more"):
        check_image_data(config(smallest - 1))
    with pytest.raises(ValueError, match=rf"input_size=\[64, {smallest - 1}\]"):
        check_image_data(config([64, smallest - 1]))
    cfg = config(smallest - 1)
    cfg.model.backbone.type = "OtherBackbone"
    check_image_data(cfg)


def test_works_without_mmdet(pets):
    # The data package is used on machines without a detector.
    make_config(num_classes=7).dump("config.json")
    code = (
        "import sys; sys.modules['mmdet'] = None; from mmengine.config import Config\n"
        "from mmbivit.datasets import check_image_data\n"
        "try: check_image_data(Config.fromfile('config.json'))\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("data/pets/train has 3 classes")


def test_set_data_root_of_both_kinds():
    cfg = make_config(class_map=f"{ROOT}/classes.txt")
    cfg.test_dataloader.dataset = {
        "type": "CocoDataset",
        "data_root": "data/coco/",
        "ann_file": "annotations/val.json",
        "data_prefix": {"img": "val2017/"},
    }
    cfg.test_evaluator = {"type": "CocoMetric", "ann_file": "data/coco/annotations/val.json"}
    set_data_root(cfg, "/new")
    assert "data/" not in cfg.pretty_text
    assert cfg.data_root == cfg.train_dataloader.dataset.data_root == cfg.test_dataloader.dataset.data_root == "/new"
    assert cfg.val_dataloader.dataset.class_map == "/new/classes.txt"
    assert cfg.test_evaluator.ann_file == "/new/annotations/val.json"
