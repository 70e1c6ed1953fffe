"""Logs of MMEngine become series with the right iterations, over epochs, resumed runs and stages."""

import json
import math

import numpy as np
import pytest

from mmbivit.analysis.training_log import read_training_log
from mmbivit.checks import UserError
from tests.analysis.logs import CONFIG, flips_entry, train_entry, write_run
from tests.engine.toy import make_runner


def points(series):
    return list(zip(series.steps.tolist(), series.values.tolist(), strict=True))


def test_all_that_a_real_run_logged_is_read(tmp_path):
    make_runner(tmp_path, dict(switch_epoch=1), length=2, hooks=[dict(type="mmbivit.SignFlipsHook")]).train()
    log = read_training_log(tmp_path)
    (file,) = tmp_path.glob("*/vis_data/scalars.json")
    entries = [json.loads(line) for line in file.read_text().splitlines()]
    trained = [entry for entry in entries if "lr" in entry]
    for key in ("loss", "loss_task", "lr", "grad_norm"):
        assert points(log.train[key]) == [(iteration, entry[key]) for iteration, entry in enumerate(trained, 1)]
    assert log.train["loss"].steps.tolist() == list(range(1, 9))
    seen = [entry for entry in entries if "sign_flips" in entry]
    assert set(log.flips) == {key for key in seen[0] if key.startswith("sign_flips")} and len(log.flips) > 10
    assert points(log.flips["sign_flips"]) == [(4, seen[0]["sign_flips"]), (8, seen[1]["sign_flips"])]
    assert not {"iter", "step", "epoch"} & set(log.train)
    assert (log.epoch_length, log.switches, log.last_step, log.validation) == (4, (), 8, {})


def test_a_resumed_run_replaces_what_it_repeats(tmp_path):
    """The first is killed after iteration 34 and resumed from 20; a third is killed before it logs anything."""
    first = [train_entry(step, loss=1.0) for step in (10, 20, 30)]
    first[2:2] = [flips_entry(24, a=0.1), {"coco/bbox_mAP": 0.1, "step": 0}]
    first += [{"coco/bbox_mAP": 0.2, "step": 0}, flips_entry(32, a=0.1)]
    second = [flips_entry(24, a=0.2), train_entry(30, loss=2.0), {"coco/bbox_mAP": 0.3, "step": 0}, train_entry(40)]
    write_run(tmp_path, "20260101_120000", first, rest='{"loss": 0.3, "it')
    write_run(tmp_path, "20260101_130000", second)
    write_run(tmp_path, "20260101_140000", [])
    log = read_training_log(tmp_path)
    assert points(log.train["loss"]) == [(10, 1.0), (20, 1.0), (30, 2.0), (40, 2.5)]
    assert points(log.flips["sign_flips"]) == [(24, 0.2)]
    assert points(log.validation["coco/bbox_mAP"]) == [(30, 0.3)]


@pytest.mark.parametrize("killed_in_epoch", [1, 2])
def test_epochs_are_as_long_as_their_first_entries_are_apart(tmp_path, killed_in_epoch):
    """Epochs of 25 iterations, of which every tenth is logged, in two runs."""
    entries = [train_entry(25 * (epoch - 1) + iteration, epoch=epoch) for epoch in (1, 2, 3) for iteration in (10, 20)]
    end = 2 * killed_in_epoch - 1
    write_run(tmp_path, "1", entries[:end])
    metrics = [{"accuracy/top1": 10.0 * epoch, "time": 0.1, "data_time": 0.1, "step": epoch} for epoch in (1, 2, 3)]
    rest = entries[end:]
    for epoch, metric in enumerate(metrics, 1):
        place = next((n for n, entry in enumerate(rest) if entry.get("epoch", 0) > epoch), len(rest))
        rest.insert(place, metric)
    write_run(tmp_path, "2", rest)
    log = read_training_log(tmp_path)
    assert log.epoch_length == 25
    assert points(log.validation["accuracy/top1"]) == [(25, 10.0), (50, 20.0), (75, 30.0)]
    assert set(log.validation) == {"accuracy/top1"} and log.last_step == 75


@pytest.mark.parametrize("steps, places", [((0, 0), (100, 200)), ((120, 210), (120, 210))])
def test_metrics_of_a_run_by_iterations_are_put_where_they_were_logged(tmp_path, steps, places):
    """LoggerHook writes epoch 0, or, with log_metric_by_epoch=False, the iteration."""
    entries = [train_entry(step) for step in (50, 100, 150, 200)]
    entries.insert(2, {"mAP": 0.1, "loss": 3.0, "step": steps[0]})
    entries.append({"mAP": 0.2, "loss": 2.0, "step": steps[1]})
    write_run(tmp_path, "1", entries)
    log = read_training_log(tmp_path)
    assert points(log.validation["mAP"]) == [(places[0], 0.1), (places[1], 0.2)]
    assert points(log.validation["val/loss"]) == [(places[0], 3.0), (places[1], 2.0)]
    assert log.train["loss"].steps.tolist() == [50, 100, 150, 200] and log.epoch_length is None
    assert log.series("mAP") is log.validation["mAP"] and log.series("loss") is log.train["loss"]


def test_numbers_that_are_not_finite_are_read_and_what_is_no_number_is_left_out(tmp_path):
    entries = [train_entry(1, loss=math.nan), train_entry(2, loss=math.inf, note="text", flag=True)]
    file = write_run(tmp_path, "1", entries)
    assert "NaN" in file.read_text() and "Infinity" in file.read_text()
    log = read_training_log(tmp_path)
    np.testing.assert_array_equal(log.train["loss"].values, [math.nan, math.inf])
    assert set(log.train) == {"loss", "lr", "time"}


@pytest.mark.parametrize(
    "hook, switches",
    [
        ("switch_iter=7", (7,)),
        ("switch_epoch=2, teacher=None", (8,)),
        ("switch_iter=None, switch_epoch=1", (4,)),
        ("switch_iter=[3, 7]", (3, 7)),
        ("switch_epoch=[1, 2]", (4, 8)),
    ],
)
@pytest.mark.parametrize("beside_log", [True, False])
def test_the_switch_is_read_from_the_config_of_the_newest_run(tmp_path, hook, switches, beside_log):
    entries = [train_entry(step, epoch=1 + (step - 1) // 4) for step in range(1, 13)]
    config = CONFIG.format(hook)
    write_run(tmp_path, "1", entries, config=CONFIG.format("switch_iter=3") if beside_log else "")
    write_run(tmp_path, "2", entries, config=config if beside_log else "")
    if not beside_log:
        (tmp_path / "some.py").write_text(config)
    assert read_training_log(tmp_path).switches == switches


def test_no_switch_without_stages_or_where_the_log_does_not_tell(tmp_path):
    entries = [train_entry(step) for step in (1, 2)]
    write_run(tmp_path / "float", "1", entries, config="model = dict(type='Some')\ncustom_hooks = [dict(type='Other')]")
    write_run(tmp_path / "epochs", "1", entries, config=CONFIG.format("switch_epoch=1"))
    assert read_training_log(tmp_path / "float").switches == ()
    assert read_training_log(tmp_path / "epochs").switches == ()


def test_what_is_no_work_dir_of_training_is_refused_in_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^work dir .*missing does not exist, or is no folder$"):
        read_training_log(tmp_path / "missing")
    with pytest.raises(ValueError, match=r"^work dir .* is empty; give the --work-dir of a training run$"):
        read_training_log(tmp_path)
    (tmp_path / "epoch_1.pth").touch()
    with pytest.raises(ValueError, match=r"^work dir .* has no log of training, .*scalars.json; give"):
        read_training_log(tmp_path)
    write_run(tmp_path, "1", [], rest='{"lo')
    with pytest.raises(ValueError, match=r"^the logs in work dir .* have no entry yet$"):
        read_training_log(tmp_path)


@pytest.mark.parametrize(
    "damaged", ['{"loss": 0.', "", "[1, 2]", '{"loss": 0.5}', '{"step": "1"}', "\0\0", "[" * 10**5]
)
def test_a_damaged_line_in_the_middle_is_named(tmp_path, damaged):
    rest = f"{damaged}\n{json.dumps(train_entry(2))}\n"
    file = write_run(tmp_path, "1", [train_entry(1)], rest=rest)
    with pytest.raises(ValueError) as error:
        read_training_log(tmp_path)
    assert str(error.value).startswith(f"{file}, line 2 is damaged: ") and "\n" not in str(error.value)
    file.write_text(json.dumps(train_entry(1)) + "\n" + damaged)
    assert points(read_training_log(tmp_path).train["loss"]) == [(1, 100.0)]


def test_a_damaged_config_beside_the_log_is_named(tmp_path):
    file = write_run(tmp_path, "1", [train_entry(1)], config="custom_hooks = [")
    with pytest.raises(UserError, match=f"^config {file.with_name('config.py')} "):
        read_training_log(tmp_path)


def test_a_key_that_is_not_there_is_answered_with_those_that_are(tmp_path):
    write_run(tmp_path, "1", [train_entry(4), flips_entry(4, a=0.5), {"mAP": 0.5, "step": 4}])
    log = read_training_log(tmp_path)
    assert points(log.series("sign_flips/a")) == [(4, 0.5)]
    with pytest.raises(ValueError) as error:
        log.series("los")
    assert str(error.value).endswith("has no 'los'; did you mean 'loss'?; it has lr, loss, time, mAP, sign_flips")
