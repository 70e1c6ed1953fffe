"""Missing COCO data is found before the run, and pointing a config elsewhere reaches every path."""

import copy
from pathlib import Path

import pytest
from mmengine.config import Config

from mmbivit.datasets import check_coco_data, make_digit_scenes, set_data_root


def make_config(root: str = "data/coco/") -> Config:
    """As mmdet's ``_base_/datasets/coco_instance.py``."""

    def dataset(split: str) -> dict:
        return {
            "type": "CocoDataset",
            "data_root": root,
            "ann_file": f"annotations/instances_{split}2017.json",
            "data_prefix": {"img": f"{split}2017/"},
            "backend_args": None,
        }

    evaluator = {"type": "CocoMetric", "ann_file": f"{root}annotations/instances_val2017.json", "backend_args": None}
    return Config(
        {
            "data_root": root,
            "train_dataloader": {"batch_size": 2, "dataset": dataset("train")},
            "val_dataloader": {"dataset": dataset("val")},
            "test_dataloader": {"dataset": dataset("val")},
            "val_evaluator": evaluator,
            "test_evaluator": copy.deepcopy(evaluator),
        }
    )


@pytest.fixture
def workdir(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def message_of(cfg: Config, *args) -> str:
    with pytest.raises(FileNotFoundError) as error:
        check_coco_data(cfg, *args)
    return str(error.value)


def test_one_error_with_everything(workdir):
    assert message_of(make_config()) == (
        f"""\
The data of this config is incomplete. Missing:
  data/coco/annotations/instances_train2017.json
  data/coco/train2017/
  data/coco/annotations/instances_val2017.json
  data/coco/val2017/

Expected (relative to {workdir}):
  data/coco/
  ├── annotations/
  │   ├── instances_train2017.json  <- missing
  │   └── instances_val2017.json  <- missing
  ├── train2017/  <- missing
  └── val2017/  <- missing

What to do:
  - The data is in another folder: pass it to tools/train.py or tools/test.py as --data-root DIR,
    or link it: ln -s DIR data/coco
  - You have no data: make small demo data of the same layout, in seconds and without a download:
    python tools/make_digit_scenes.py --layout coco --out data/coco"""
    )


def test_the_advice_works(workdir):
    make_digit_scenes("data/coco", train=1, val=1, size=32, layout="coco")
    check_coco_data(make_config())


def test_only_the_modes_asked_for(workdir):
    make_digit_scenes("data/coco", train=1, val=1, size=32, layout="coco")
    Path("data/coco/annotations/instances_train2017.json").unlink()
    check_coco_data(make_config(), ("val", "test"))
    message = message_of(make_config(), ("train",))
    assert "instances_train2017.json  <- missing" in message
    assert "train2017/\n" in message and "val2017" not in message
    # The folder is in use: the demo data must go beside it.
    assert "--layout coco --out data/coco_demo\n    and pass --data-root data/coco_demo" in message
    assert "ln -s" not in message
    with pytest.raises(ValueError, match="got testing"):
        check_coco_data(make_config(), ("testing",))


def test_file_in_the_place_of_a_folder_is_missing(workdir):
    make_digit_scenes("data/coco", train=1, val=1, size=32, layout="coco")
    folder = Path("data/coco/val2017")
    folder.rename("elsewhere")
    folder.write_text("")
    assert "Missing:\n  data/coco/val2017/\n\n" in message_of(make_config())


def test_plain_layout_gets_its_own_command(workdir):
    cfg = make_config("data/digit_scenes/")
    for mode, split in (("train", "train"), ("val", "val"), ("test", "val")):
        cfg[f"{mode}_dataloader"].dataset.update(ann_file=f"annotations/{split}.json", data_prefix={"img": split})
    for mode in ("val", "test"):
        cfg[f"{mode}_evaluator"].ann_file = "data/digit_scenes/annotations/val.json"
    assert "    python tools/make_digit_scenes.py --out data/digit_scenes" in message_of(cfg)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda dataset: {"type": "RepeatDataset", "times": 2, "dataset": dataset},
        lambda dataset: {"type": "ConcatDataset", "datasets": [dataset]},
        lambda dataset: {
            "type": "ClassBalancedDataset",
            "dataset": {"type": "ConcatDataset", "datasets": [{"type": "RepeatDataset", "dataset": dataset}]},
        },
    ],
)
def test_wrappers(workdir, wrap):
    cfg = make_config()
    cfg.train_dataloader.dataset = wrap(cfg.train_dataloader.dataset.to_dict())
    assert "data/coco/train2017/" in message_of(cfg, ("train",))
    set_data_root(cfg, "elsewhere")
    message = message_of(cfg, ("train",))
    assert "elsewhere/train2017/" in message and "data/coco" not in message


def test_evaluators_in_a_list_and_missing_loops(workdir):
    cfg = make_config()
    cfg.val_evaluator = [{"type": "DumpResults"}, cfg.val_evaluator.to_dict()]
    cfg.train_dataloader = cfg.val_dataloader = None
    message = message_of(cfg, ("train", "val"))
    assert "Missing:\n  data/coco/annotations/instances_val2017.json\n\n" in message


def test_other_datasets_and_remote_data_are_left_alone(workdir):
    check_coco_data(Config({"train_dataloader": {"dataset": {"type": "VOCDataset", "ann_file": "a/trainval.txt"}}}))
    check_coco_data(Config({}))
    check_coco_data(make_config("s3://bucket/coco/"))
    cfg = make_config()
    for mode in ("train", "val", "test"):
        cfg[f"{mode}_dataloader"].dataset.backend_args = {"backend": "petrel"}
    for mode in ("val", "test"):
        cfg[f"{mode}_evaluator"].backend_args = {"backend": "petrel"}
    check_coco_data(cfg)
    cfg.train_dataloader.dataset.backend_args = {"backend": "local"}
    assert "train2017" in message_of(cfg)


def test_two_roots(workdir):
    cfg = make_config()
    cfg.train_dataloader.dataset.data_root = "/nowhere/lvis"
    message = message_of(cfg)
    assert "/nowhere/lvis/train2017/" in message and "  data/coco/\n  ├── annotations/" in message
    assert "make_digit_scenes" not in message


def test_set_data_root_reaches_every_path(workdir):
    cfg = make_config()
    set_data_root(cfg, "/some/where")
    assert "data/coco" not in cfg.pretty_text
    assert cfg.data_root == "/some/where"
    for mode in ("train", "val", "test"):
        assert cfg[f"{mode}_dataloader"].dataset.data_root == "/some/where"
    for mode in ("val", "test"):
        assert cfg[f"{mode}_evaluator"].ann_file == "/some/where/annotations/instances_val2017.json"


def test_set_data_root_below_the_old_one(workdir):
    # Objects that val and test share must not be moved twice.
    cfg = make_config()
    cfg.test_dataloader, cfg.test_evaluator = cfg.val_dataloader, cfg.val_evaluator
    set_data_root(cfg, "data/coco/small")
    assert cfg.test_evaluator.ann_file == "data/coco/small/annotations/instances_val2017.json"


def test_set_data_root_with_paths_that_repeat_the_root(workdir):
    cfg = make_config("/old/coco/")
    dataset = cfg.train_dataloader.dataset
    dataset.ann_file = "/old/coco/annotations/instances_train2017.json"
    dataset.data_prefix.img = "/old/coco/train2017"
    set_data_root(cfg, "new")
    assert (dataset.ann_file, dataset.data_prefix.img) == ("annotations/instances_train2017.json", "train2017")


def test_set_data_root_needs_one():
    with pytest.raises(ValueError, match="no TimmDataset and no COCO-like dataset"):
        set_data_root(Config({"train_dataloader": {"dataset": {"type": "CocoDataset", "ann_file": "a.json"}}}), "b")


def test_mmdet_config(workdir):
    # The real thing, as our main configs inherit it.
    mmdet = pytest.importorskip("mmdet")
    path = Path(mmdet.__file__).parent / ".mim/configs/_base_/datasets/coco_instance.py"
    if not path.is_file():
        pytest.skip("this mmdet has no configs inside")
    cfg = Config.fromfile(path)
    assert "make_digit_scenes.py --layout coco --out data/coco" in message_of(cfg)
    demo = make_digit_scenes("demo", train=1, val=1, size=32, layout="coco")
    set_data_root(cfg, str(demo.root))
    check_coco_data(cfg)
