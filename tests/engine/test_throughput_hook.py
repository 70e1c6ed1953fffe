"""Images per second, by hand and in the log of runs."""

from types import SimpleNamespace

import pytest
import torch
from mmengine.logging import MessageHub

from mmbivit.engine import ThroughputHook
from tests.analysis.logs import logged
from tests.engine.toy import make_runner

SPEED = "train/images_per_s"


def run(batches, times, window_size=2) -> MessageHub:
    """Let the hook see some iterations."""
    hub = MessageHub("throughput")
    hub.update_scalar("train/time", 100.0)  # from before a resume: not in the window
    runner = SimpleNamespace(log_processor=SimpleNamespace(window_size=window_size), message_hub=hub)
    hook = ThroughputHook()
    hook.before_train(runner)
    for batch_idx, (batch, time) in enumerate(zip(batches, times, strict=True)):
        hub.update_scalar("train/time", time)
        hook.after_train_iter(runner, batch_idx, batch)
    return hub


def test_speed_is_images_over_seconds_in_the_window(monkeypatch):
    batches = [dict(inputs=torch.zeros(size, 3, 2, 2)) for size in (4, 2, 6)]
    hub = run(batches, (0.5, 0.25, 1.0))
    expected = [4 / 0.5, (4 + 2) / (0.5 + 0.25), (2 + 6) / (0.25 + 1.0)]
    assert hub.get_scalar(SPEED).data[0].tolist() == pytest.approx(expected)

    monkeypatch.setattr("mmbivit.engine.throughput_hook.get_world_size", lambda: 3)
    assert run(batches[:1], (0.5,)).get_scalar(SPEED).current() == pytest.approx(3 * 4 / 0.5)


def test_detectors_have_lists_of_images():
    batch = dict(inputs=[torch.zeros(3, 2, 2), torch.zeros(3, 4, 2), torch.zeros(3, 2, 4)], data_samples=[])
    assert run([batch], (0.5,)).get_scalar(SPEED).current() == pytest.approx(3 / 0.5)


@pytest.mark.parametrize("batch", [None, [torch.zeros(2, 3, 2, 2)], dict(img=1), dict(inputs=dict(weak=[]))])
def test_other_batches_are_left_out(batch):
    assert SPEED not in run([batch], (0.5,)).log_scalars


@pytest.mark.parametrize("by_epoch", [True, False])
def test_every_line_of_the_log_has_speed_and_eta(tmp_path, by_epoch):
    hooks, accumulate = [dict(type="mmbivit.ThroughputHook")], dict(accumulative_counts=2)
    make_runner(tmp_path, None, by_epoch=by_epoch, length=2, hooks=hooks, optim=accumulate).train()

    steps = logged(tmp_path, "loss")
    assert len(steps) == (8 if by_epoch else 2)
    for step in steps:  # two images, and a window of one iteration
        assert step["images_per_s"] == pytest.approx(2 / step["time"], rel=1e-6)
    (log,) = tmp_path.glob("*/*.log")
    lines = [line for line in log.read_text().splitlines() if "(train)" in line and "loss" in line]
    assert len(lines) == len(steps)
    assert all("images_per_s: " in line and "eta: " in line for line in lines)
