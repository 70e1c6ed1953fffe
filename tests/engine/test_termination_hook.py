"""A run that is told to end saves what it has, says from where it goes on, and loses no iteration."""

import os
import signal
import sys

import pytest
import torch
from mmengine.dataset import default_collate
from mmengine.hooks import Hook

from mmbivit.checkpoints import load_checkpoint_file
from mmbivit.engine import TerminationHook

from .test_atomic_checkpoint_hook import Evaluator, Line, Scripted
from .toy import ToyData, make_runner

SAVE = dict(type="mmbivit.AtomicCheckpointHook", interval=5)


class Send(Hook):
    """Sends this process a signal at one place of a run, and notes the iterations."""

    priority = "VERY_HIGH"

    def __init__(self, place="before_train_iter", at=2, number=signal.SIGTERM):
        self.place, self.at, self.number, self.iterations = place, at, number, []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.iterations.append(runner.iter)
        self.send(runner, "before_train_iter")

    def after_train_epoch(self, runner):
        self.send(runner, "after_train_epoch")

    def before_val_iter(self, runner, batch_idx, data_batch=None):
        self.send(runner, "before_val_iter")

    def before_train(self, runner):
        self.send(runner, "before_train")

    def send(self, runner, place):
        if place == self.place and runner.iter >= self.at:
            os.kill(os.getpid(), self.number)


@pytest.fixture
def messages(monkeypatch):
    found = []
    monkeypatch.setattr("mmbivit.engine.termination_hook.print_log", lambda text, *args: found.append(text))
    return found


def run(work_dir, *hooks, **kwargs):
    """Train two epochs of four iterations; return the termination hook with what stopped the run."""
    torch.manual_seed(0)
    loader = dict(batch_size=8, sampler=dict(type="DefaultSampler"), dataset=ToyData(), collate_fn=default_collate)
    validation = dict(val_dataloader=loader, val_cfg=dict(type="ValLoop"), val_evaluator=Evaluator(Scripted()))
    all_hooks = [dict(type="mmbivit.ResumableTrainingHook"), hook := TerminationHook(), *hooks]
    runner = make_runner(
        work_dir, None, model=Line(), length=2, hooks=all_hooks, **dict(checkpoint=SAVE) | validation | kwargs
    )
    try:
        runner.train()
    except SystemExit as stop:
        return stop.code
    finally:
        hook.restore()
    return 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize(
    ("place", "at", "made"), [("before_train_iter", 2, 3), ("before_train_iter", 3, 4), ("after_train_epoch", 4, 4)]
)
def test_the_iteration_is_finished_and_saved_and_the_resumed_run_goes_on_behind_it(
    tmp_path, messages, number, place, at, made
):
    assert run(tmp_path, send := Send(place, at, number)) == 128 + number
    assert send.iterations == list(range(made))
    name = signal.Signals(number).name
    assert messages == [f"Ended by {name}: --resume goes on from {tmp_path / 'interrupted.pth'}."]
    meta = load_checkpoint_file(str(tmp_path / "interrupted.pth"))["meta"]
    assert (meta["iter"], meta["epoch"]) == (made, int(place == "after_train_epoch"))

    assert run(tmp_path, rest := Send(at=99), resume=True) == 0
    assert rest.iterations == list(range(made, 8))
    assert run(tmp_path / "whole", Send(at=99)) == 0
    ended, whole = (load_checkpoint_file(str(folder / "epoch_2.pth")) for folder in (tmp_path, tmp_path / "whole"))
    for key in ended["state_dict"]:
        assert torch.equal(ended["state_dict"][key], whole["state_dict"][key])
    assert not (tmp_path / "interrupted.pth").exists()


@pytest.mark.parametrize(("place", "at"), [("before_train_iter", 7), ("after_train_epoch", 8)])
def test_a_checkpoint_of_this_iteration_is_enough(tmp_path, messages, place, at):
    checkpoint = SAVE | dict(interval=1, by_epoch=False)
    assert run(tmp_path, Send(place, at), checkpoint=checkpoint) == 143
    assert messages == [f"Ended by SIGTERM: --resume goes on from {tmp_path / 'iter_8.pth'}."]
    assert run(tmp_path, rest := Send(at=99), checkpoint=checkpoint, resume=True) == 0
    assert rest.iterations == []


@pytest.mark.parametrize(
    ("place", "checkpoint", "line"),
    [
        ("before_val_iter", SAVE | dict(interval=1), "--resume goes on from {}/epoch_1.pth"),
        ("before_val_iter", SAVE, "nothing is saved yet"),
        ("before_train", SAVE, "nothing is saved yet"),
        ("before_train_iter", dict(type="CheckpointHook"), "nothing is saved yet"),
    ],
)
def test_what_cannot_be_saved_is_not(tmp_path, capfd, messages, place, checkpoint, line):
    """In validation the weights may be another average's, and before training there is nothing."""
    assert run(tmp_path, Send(place, at=0), checkpoint=checkpoint) == 143
    said = capfd.readouterr().err + "\n".join(messages)
    assert f"Ended by SIGTERM: {line.format(tmp_path)}." in said
    assert not (tmp_path / "interrupted.pth").exists()


def test_a_second_signal_does_not_wait(tmp_path, capfd):
    class Twice(Send):
        def send(self, runner, place):
            super().send(runner, place)
            super().send(runner, place)

    assert run(tmp_path, Twice(at=1)) == 143
    assert "nothing is saved yet" in capfd.readouterr().err


def test_an_ignored_signal_stays_ignored(tmp_path):
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert run(tmp_path, Send(number=signal.SIGHUP)) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_signals_are_given_back(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)]
    run(tmp_path)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)] == before


@pytest.mark.skipif(sys.platform == "win32", reason="no forks there")
def test_forked_workers_end_by_the_signal(tmp_path):
    hook = TerminationHook()
    hook.install(tmp_path)
    try:
        if (pid := os.fork()) == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM
    finally:
        hook.restore()
