"""Random numbers of data loading follow from the seed and the place in the run."""

import random

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler

from mmbivit.engine import seeded_batches
from mmbivit.engine.seeded_batches import SeededBatchSampler, seed_all


class Draws(Dataset):
    """What each of the three generators draws for an index."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return index, random.random(), float(np.random.rand()), float(torch.rand(1))


def load(num_workers=0, epochs=2, sampler=None, **kwargs):
    """Epochs of batches of lists of draws."""
    batches = BatchSampler(sampler or SequentialSampler(range(10)), 4, drop_last=False)
    seeded = SeededBatchSampler(batches, **dict(seed=5) | kwargs)
    loader = DataLoader(Draws(), batch_sampler=seeded, num_workers=num_workers, collate_fn=list)
    assert len(loader) == 3
    return [list(loader) for _ in range(epochs)]


def test_draws_do_not_depend_on_workers_or_on_what_was_drawn_before():
    expected = load()
    random.random(), np.random.rand(3), torch.rand(7)
    assert load() == load(num_workers=1) == load(num_workers=3) == expected
    assert [[item[0] for item in batch] for batch in expected[1]] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    # They do depend on place, epoch and seed, and the generators differ.
    draws = [draw for epoch in [*expected, *load(seed=6)] for batch in epoch for item in batch for draw in item[1:]]
    assert len(set(draws)) == len(draws) == 4 * 10 * 3


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("epoch", "start"), [(0, 0), (0, 1), (0, 2), (0, 3), (0, 4), (1, 0), (1, 2), (0, 7)])
def test_a_start_within_a_run_goes_on_as_the_whole_run(workers, epoch, start):
    whole = [batch for pass_ in load(epochs=4) for batch in pass_]
    rest = [batch for pass_ in load(workers, epochs=4, epoch=epoch, start=start, endless=True) for batch in pass_]
    begin = 3 * epoch + start
    assert rest[: 12 - begin] == whole[begin:]


def test_an_epoch_of_which_nothing_is_left_is_empty():
    whole = load(epochs=2)
    assert load(epochs=2, start=3) == [[], whole[1]]
    assert load(epochs=2, start=2) == [whole[0][2:], whole[1]]


def test_global_random_numbers_of_a_sampler_are_seeded_too():
    def order(epoch):
        return [item[0] for batch in load(sampler=RandomSampler(range(10)), epochs=1, epoch=epoch)[0] for item in batch]

    assert order(0) == order(0) != order(1)


def test_ranks_together_draw_what_one_process_draws(monkeypatch):
    """Rank r of samplers has every world_size-th index, so two ranks of batch 2 see one process's batch of 4."""
    (one,) = load(epochs=1)
    both = []
    for rank in range(2):
        monkeypatch.setattr(seeded_batches, "get_dist_info", lambda rank=rank: (rank, 2))
        batches = SeededBatchSampler(BatchSampler(range(rank, 10, 2), 2, drop_last=False), seed=5)
        both.append([item for batch in DataLoader(Draws(), batch_sampler=batches, collate_fn=list) for item in batch])
    interleaved = [item for pair in zip(*both, strict=True) for item in pair]
    assert interleaved == [item for batch in one for item in batch]


def test_an_empty_sampler_ends():
    assert list(SeededBatchSampler([], seed=0, start=3, endless=True)) == []


def test_keys_are_used_whole():
    """Keys that differ in any place, also by a zero at the end, give other random numbers of all generators."""
    keys = [(0,), (1,), (0, 0), (0, 1), (1, 0), (-1,), (2**40,), (2**40 + 1,), ("image", 0), ("epoch", 0)]
    draws = []
    for key in keys:
        seed_all(*key)
        draws.append((random.random(), float(np.random.rand()), float(torch.rand(1))))
    assert [len(set(column)) for column in zip(*draws, strict=True)] == [len(keys)] * 3
    seed_all(*keys[3])
    assert (random.random(), float(np.random.rand()), float(torch.rand(1))) == draws[3]
