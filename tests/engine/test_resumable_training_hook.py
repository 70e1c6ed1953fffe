"""A resumed run goes on as if it had not been interrupted. Kills of processes: tests/robustness/test_killed_runs.py."""

import random

import numpy as np
import pytest
import torch
from mmengine.hooks import Hook
from mmengine.runner import loops
from torch.utils.data import BatchSampler, IterableDataset, get_worker_info

from mmbivit.engine import resumable_training_hook
from mmbivit.engine.resumable_training_hook import _EndlessIterator

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
    end_workers(runner)
    return runner, trace.rows


def end_workers(runner):
    """Now, and not whenever memory is collected: that may wait for seconds."""
    runner.train_loop.dataloader_iterator = runner.train_dataloader._iterator = None


@pytest.mark.parametrize(
    ("by_epoch", "sampler", "seed"),
    [(True, "DefaultSampler", 0), (True, "DefaultSampler", None), (False, "InfiniteSampler", None)]
    + [(False, "DefaultSampler", 0)],
)
def test_any_iteration_can_be_resumed(tmp_path, by_epoch, sampler, seed):
    """Also within an epoch, which MMEngine begins anew, at its last iteration, and where the seed was drawn."""
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


class EagerIterator:
    """As in MMEngine 0.10.7: workers start before any hook is called and anew at the end, and nothing is skipped."""

    def __init__(self, loader):
        self._loader = loader
        self._iterator = iter(loader)

    def __next__(self):
        try:
            return next(self._iterator)
        except StopIteration:
            self._iterator = iter(self._loader)
            return next(self._iterator)


class GatheringSampler(BatchSampler):
    """Gathers two batches, then gives both: like mmdet's, it keeps what it has gathered when it is stopped."""

    gathered = ()

    def __iter__(self):
        for index in self.sampler:
            self.gathered = (*self.gathered, index)
            if len(self.gathered) >= 2 * self.batch_size:
                yield list(self.gathered[: self.batch_size])
                yield list(self.gathered[self.batch_size : 2 * self.batch_size])
                self.gathered = self.gathered[2 * self.batch_size :]


@pytest.mark.parametrize("sampler", ["InfiniteSampler", "DefaultSampler"])
@pytest.mark.parametrize("batch_sampler", [None, dict(type=GatheringSampler, drop_last=False)])
def test_batches_that_workers_took_too_early_come_again(tmp_path, sampler, batch_sampler, monkeypatch):
    """Equal to a run without workers, over more than one pass through the data, whole and resumed."""
    monkeypatch.setattr(loops, "_InfiniteDataloaderIterator", EagerIterator)
    kwargs = dict(by_epoch=False, length=10, sampler=sampler, every=5)
    data = dict(batch_sampler=batch_sampler)
    whole, rows = run(tmp_path / "whole", data=data, **kwargs)
    point = str(tmp_path / "whole" / "iter_5.pth")
    data |= dict(persistent_workers=True)
    for name, options in dict(again={}, resumed=dict(resume=True, load_from=point)).items():
        runner, again = run(tmp_path / name, data=data, workers=1, **options, **kwargs)
        assert len(again) == (5 if name == "resumed" else 10)
        assert again == {i: rows[i] for i in again}
        for a, b in zip(whole.model.state_dict().values(), runner.model.state_dict().values(), strict=True):
            assert torch.equal(a, b)


def brighten(worker):
    get_worker_info().dataset.images += 100


@pytest.mark.parametrize("iterator", [loops._InfiniteDataloaderIterator, EagerIterator])
def test_workers_start_when_all_hooks_have_set_up_the_loader(tmp_path, iterator, monkeypatch):
    class SetUp(Hook):
        priority = "LOWEST"

        def before_train(self, runner):
            runner.train_dataloader.worker_init_fn = brighten

    monkeypatch.setattr(loops, "_InfiniteDataloaderIterator", iterator)
    _, rows = run(tmp_path, by_epoch=False, length=2, workers=1, hooks=(HOOK, SetUp()))
    assert min(pixel for pixels, *_ in rows.values() for pixel in pixels) > 50


def test_a_loader_that_cannot_be_built_again_trains_and_is_said(tmp_path, messages, monkeypatch):
    monkeypatch.setattr(loops, "_InfiniteDataloaderIterator", EagerIterator)
    runner = make_runner(tmp_path, None, by_epoch=False, length=6, hooks=[HOOK], data=dict(num_workers=1))
    runner._train_dataloader = runner.build_dataloader(runner._train_dataloader, seed=0)
    runner.train()
    end_workers(runner)
    assert runner.iter == 6
    assert ["not built from a config" in message for message in messages] == [True]


def test_older_loops_skip_by_taking_batches():
    older = _EndlessIterator([7, 8], to_skip=3)
    assert [next(older) for _ in range(6)] == [None, None, None, 7, 8, 7]
    newer = _EndlessIterator([7, 8], to_skip=0)
    newer.skip_iter(3)
    assert next(newer) == 7
