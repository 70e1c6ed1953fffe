"""The demo's machinery with steps that take no time; the demo itself runs in CI."""

import copy
import io
import json
import sys

import numpy as np
import pytest
import torch
from mmengine.registry import MODELS, DefaultScope
from pycocotools import mask as mask_utils
from rich.console import Console

from mmbivit import get_config
from mmbivit.datasets import DigitScenes, make_digit_scenes
from mmbivit.demo.comparison import draw_comparison, read_metrics, report_table
from mmbivit.demo.speed import Speed, times_in_turn
from mmbivit.demo.steps import FULL, QUICK, Step, _run_logged, run_steps
from mmbivit.deploy import pack, save


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=100)


def test_finished_steps_are_not_repeated_and_interrupted_ones_are(tmp_path, console):
    calls = []

    def interrupted(report):
        calls.append("second")
        if calls.count("second") == 1:
            raise KeyboardInterrupt

    steps = [Step("first", "First", lambda report: calls.append("first")), Step("second", "Second", interrupted)]
    with pytest.raises(KeyboardInterrupt):
        run_steps(steps, tmp_path, QUICK, console)
    before = json.loads((tmp_path / "demo.json").read_text())
    assert before["done"] == ["first"] and set(before["seconds"]) == {"first", "second"}
    seconds = run_steps(steps, tmp_path, QUICK, console)
    assert calls == ["first", "second", "second"]
    assert seconds["second"] > before["seconds"]["second"] and seconds["first"] == before["seconds"]["first"]
    assert "First (done before" in console.file.getvalue()
    with pytest.raises(ValueError, match="holds the results of a quick demo; give another folder with --out"):
        run_steps(steps, tmp_path, FULL, console)


def test_progress_is_read_from_mmengines_lines(tmp_path):
    lines = [
        "11/21 05:00:00 - mmengine - INFO - Iter(train) [ 25/500]  eta: 0:01:40  loss: 1.5000  loss_distill: 0.1",
        "11/21 05:00:01 - mmengine - INFO - Stage 2 from iteration 30 (epoch 1): all awake.",
        "11/21 05:00:02 - mmengine - INFO - Iter(test) [10/10]  coco/bbox_mAP: 0.5",
    ]
    reports = []
    code = f"print({chr(10).join(lines)!r})"
    _run_logged([sys.executable, "-c", code], tmp_path / "logs" / "a.log", lambda *args: reports.append(args))
    assert reports == [
        (0.05, "25/500  eta 0:01:40  loss 1.50  stage 1: distilling"),
        (0.0, "Stage 2 from iteration 30 (epoch 1): all awake."),
        (1.0, "10/10"),
    ]
    assert (tmp_path / "logs" / "a.log").read_text().splitlines() == lines


def test_a_failing_command_is_named_with_its_log_and_its_last_lines(tmp_path):
    code = "print('almost there'); raise SystemExit('no such digit')"
    with pytest.raises(RuntimeError) as error:
        _run_logged([sys.executable, "-c", code], tmp_path / "a.log", lambda *args: None)
    assert "a.log" in str(error.value) and str(error.value).endswith("no such digit")


def test_table_has_the_newest_metrics_and_the_sizes(tmp_path, console):
    for name, value in (("float", 0.25), ("sibivit", 0.5), ("packed", 0.5)):
        for day, box in (("20260101_000000", 0.0), ("20260102_000000", value)):
            metrics = {f"coco/{key}": box for key in ("bbox_mAP", "bbox_mAP_50", "segm_mAP", "segm_mAP_50")}
            folder = tmp_path / f"{name}_eval" / day
            folder.mkdir(parents=True)
            (folder / f"{day}.json").write_text(json.dumps(metrics))
    assert read_metrics(tmp_path / "float_eval")["box AP50"] == 0.25
    seconds = dict(train_float=61.0, train_binary=125.0, test_float=3.0, test_binary=4.0, test_packed=2.0)
    cfg = get_config(QUICK.binary_config)
    with DefaultScope.overwrite_default_scope("mmdet"):
        detector = MODELS.build(copy.deepcopy(cfg.model))
    save(pack(detector), tmp_path / "sibivit.safetensors", cfg)
    speed = Speed(dict(float=50.25, binary=100.0, packed=12.5), images=7, threads=3)
    console.print(report_table(QUICK, tmp_path, seconds, speed))
    assert "median of 7 images" in console.file.getvalue() and "threads: 3" in console.file.getvalue()
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in console.file.getvalue().splitlines()]
    table = {row[0]: row[1:] for row in rows if len(row) == 4}
    assert table["mask AP50"] == ["0.250", "0.500", "0.500"]
    assert table["train time"][:2] == ["1 min 1 s", "2 min 5 s"] and table["test time"][2] == "0 min 2 s"
    counted, stored = (table[name] for name in ("with 1-bit weights (counted)", "in the packed file"))
    assert counted[0] == stored[0] == stored[1] == "-"
    # what is stored has norms folded away and channels padded
    assert abs(float(counted[1].split()[0]) - float(stored[2].split()[0])) < 0.1
    assert table["of them binary"][0] == "0.00 / 0.00 M"
    assert table["ms per image"] == ["50.2", "100.0", "12.5"]
    assert table["training iterations"][:2] == ["60", "60 float + 60"]


def test_detectors_are_timed_in_turn_and_the_first_image_twice(monkeypatch):
    now, calls = [0.0], []
    monkeypatch.setattr("mmbivit.demo.speed.time.perf_counter", lambda: now[0])

    class Model:
        def __init__(self, name, milliseconds):
            self.name, self.milliseconds = name, iter(milliseconds)

        def test_step(self, item):
            assert not torch.is_grad_enabled()
            calls.append((self.name, item))
            now[0] += next(self.milliseconds) / 1000

    models = dict(slow=Model("slow", [900, 30, 10, 20]), fast=Model("fast", [1, 3, 1, 2]))
    found = times_in_turn(models, [5, 6, 7])
    assert found == pytest.approx(dict(slow=20, fast=2))  # what warms up does not count
    assert calls == [(name, item) for item in (5, 5, 6, 7) for name in ("slow", "fast")]


def test_comparison_draws_a_column_a_scene_and_only_confident_detections(tmp_path):
    make_digit_scenes(tmp_path / "data", train=1, val=2, size=48)
    scenes = DigitScenes.load(tmp_path / "data")
    content = json.loads(scenes.ann_file("val").read_text())
    mask = np.zeros((48, 48), np.uint8, order="F")
    mask[5:20, 5:15] = 1
    rle = mask_utils.encode(mask)
    rle["counts"] = rle["counts"].decode()
    detection = dict(labels=[3, 4], scores=[0.9, 0.1], bboxes=[[5, 5, 15, 20]] * 2, masks=[rle] * 2)
    file = tmp_path / "detections.json"
    file.write_text(json.dumps(detection))
    figure = draw_comparison(tmp_path / "data", {"some detector": [file, file]})
    texts = [[text.get_text() for text in axes.texts] for axes in figure.axes]
    assert len(figure.axes) == 4
    assert [len(names) for names in texts[:2]] == [
        sum(item["image_id"] == image["id"] for item in content["annotations"]) for image in content["images"]
    ]
    assert texts[2:] == [["3 .9"], ["3 .9"]]
    assert figure.axes[2].get_ylabel() == "some detector"
