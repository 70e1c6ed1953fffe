"""A resumed run goes on as if it had not been interrupted. Kills of processes: tests/robustness/test_killed_runs.py."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.hooks import Hook
from mmengine.runner import loops
from torch.utils.data import IterableDataset

from mmbivit.engine import resumable_training_hook
from mmbivit.engine.resumable_training_hook import _ResumedIterator

from .toy import ToyData, ToyModel, make_runner

HOOK = dict(type="mmbivit.ResumableTrainingHook")


@pytest.fixture
def messages(monkeypatch):
    """What the hook logs."""
    found = []
    monkeypatch.setattr(resumable_training_hook, "print_log", lambda message, *args: found.append(message))
    return found


class Augmented(ToyData):
    def __getitem__(self, index):
        sample = super().__getitem__(index)
        return sample | dict(inputs=sample["inputs"] + torch.rand(1) + float(np.random.rand()) + random.random())


class Trace(Hook):
    """The first pixel of each image and a random number of the model, by iteration."""

    priority = "LOWEST"

    def __init__(self):
        self.rows = {}

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        pixels = data_batch["inputs"][:, 0, 0, 0].tolist()
        self.rows[runner.iter] = (pixels, float(torch.rand(1)), float(np.random.rand()), random.random())


def run(work_dir, *, hooks=(HOOK,), by_epoch=True, length=3, every=1, seed=0, workers=0, data=None, **kwargs):
    trace = Trace()
    runner = make_runner(
        work_dir,
        None,
        model=ToyModel(drop_path_rate=0.3),
        by_epoch=by_epoch,
        length=length,
        hooks=[*hooks, trace],
        checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=every),
        data=dict(dataset=Augmented(), num_workers=workers) | (data or {}),
        **dict(randomness=dict(seed=seed)) | kwargs,
    )
    runner.train()
    return runner, trace.rows


@pytest.mark.parametrize(
    ("by_epoch", "sampler", "seed"),
    [(True, "DefaultSampler", 0), (True, "DefaultSampler", None), (False, "InfiniteSampler", None)]
    + [(False, "DefaultSampler", 0)],
)
def test_any_iteration_can_be_resumed(tmp_path, by_epoch, sampler, seed, monkeypatch):
    """Also within an epoch, which MMEngine begins anew, at its last iteration, and where the seed was drawn."""
    monkeypatch.setattr(loops, "time", SimpleNamespace(sleep=lambda seconds: None))  # it waits between epochs
    kwargs = dict(by_epoch=by_epoch, length=2 if by_epoch else 8, sampler=sampler, seed=seed)
    runner, whole = run(tmp_path / "whole", **kwargs)
    assert len(whole) == 8
    for point in (3, 4, 6):
        checkpoint = tmp_path / "whole" / f"iter_{point}.pth"
        resumed, rows = run(tmp_path / str(point), resume=True, load_from=str(checkpoint), workers=point % 2, **kwargs)
        assert rows == {i: row for i, row in whole.items() if i >= point}
        for a, b in zip(runner.model.state_dict().values(), resumed.model.state_dict().values(), strict=True):
            assert torch.equal(a, b)


def test_without_the_hook_a_resumed_run_differs(tmp_path):
    """Shows that the tests above can fail."""
    _, whole = run(tmp_path / "whole", hooks=(), length=2)
    checkpoint = str(tmp_path / "whole" / "iter_4.pth")
    _, rows = run(tmp_path / "resumed", hooks=(), length=2, resume=True, load_from=checkpoint)
    assert rows != {i: row for i, row in whole.items() if i >= 4}


def test_validation_does_not_change_training(tmp_path):
    class Draw(Hook):
        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            torch.rand(3), np.random.rand(), random.random()

    assert run(tmp_path / "a", length=1)[1] == run(tmp_path / "b", length=1, hooks=(HOOK, Draw()))[1]


def test_seeds_give_different_runs_and_places_different_numbers(tmp_path):
    a, b = (run(tmp_path / str(seed), seed=seed, length=2)[1] for seed in (0, 1))
    assert not {row[1] for row in a.values()} & {row[1] for row in b.values()}
    assert len({row[1] for row in a.values()}) == len(a) == 8


def test_another_batch_size_is_said(tmp_path, messages):
    run(tmp_path / "whole", length=1)
    run(
        tmp_path / "resumed",
        length=2,
        data=dict(batch_size=4),
        resume=True,
        load_from=str(tmp_path / "whole" / "iter_4.pth"),
    )
    (out,) = messages
    assert "Resumed with {'iterations_per_epoch': 2, 'images_per_iteration': 4}" in out
    assert "saved with {'iterations_per_epoch': 4, 'images_per_iteration': 2}" in out


def test_data_without_indices_is_said(tmp_path, messages):
    class Stream(IterableDataset):
        def __iter__(self):
            yield from (ToyData()[i] for i in range(8))

        def __len__(self):
            return 8

    run(tmp_path, length=1, data=dict(dataset=Stream(), sampler=None))
    assert [message[:43] for message in messages] == ["The data loader has no batches of indices: "]


def test_older_loops_skip_by_taking_batches():
    older = _ResumedIterator(iter([7, 8]), seen=3)
    assert [next(older) for _ in range(5)] == [None, None, None, 7, 8]

    class Newer:
        def __init__(self):
            self.items = iter([7, 8])

        def __next__(self):
            return next(self.items)

        def skip_iter(self, number):
            raise AssertionError("data begin at the right place already")

    newer = _ResumedIterator(Newer(), seen=3)
    newer.skip_iter(3)
    assert [next(newer) for _ in range(2)] == [7, 8]
