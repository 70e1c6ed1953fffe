"""Random numbers of data loading that follow from the seed and the place in the run alone."""

import hashlib
import random
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from mmengine.dist import get_dist_info

__all__ = ["SeededBatch", "SeededBatchSampler", "seed_all"]


def seed_all(*key: int | str) -> None:
    """Seed ``random``, ``numpy.random`` and torch (CPU and CUDA) with a key, which need not look random."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    random.seed(digest)
    np.random.seed(int.from_bytes(digest[:4], "little"))
    seed = int.from_bytes(digest[4:12], "little")
    # Not torch.manual_seed: where CUDA is not in use, as in a loader's workers, it formats a stack trace at each call.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


class SeededBatch(list):
    """Indices of a batch. Whoever iterates over them, as a data loader's worker does, seeds all random numbers first.

    Args:
        indices: of the images, or whatever else the data set takes.
        keys: what to seed with for each index.
    """

    def __init__(self, indices: Iterable[Any], keys: Iterable[tuple[int, ...]]):
        super().__init__(indices)
        self.keys = list(keys)

    def __iter__(self) -> Iterator[Any]:
        for index, key in zip(super().__iter__(), self.keys, strict=True):
            seed_all("image", *key)
            yield index

    def __reduce__(self) -> tuple:
        # A list would be sent to a worker item by item, and iterating over it here would seed this process.
        return SeededBatch, ([self[i] for i in range(len(self))], self.keys)


class SeededBatchSampler:
    """Batches of another batch sampler as :class:`SeededBatch`, optionally from the middle of a run on.

    What is drawn for an image depends on the seed, the epoch, and its place in the epoch over all ranks, not on the
    number of workers, nor on what was drawn before. Iterating over it once is an epoch.

    Args:
        batch_sampler: yields lists of indices.
        seed: equal on all ranks.
        epoch: number of the first epoch.
        start: batches to leave out from there on.
        endless: whether these may be more than one epoch; else the first iteration ends with the first epoch, even if
            nothing of it is left.
    """

    def __init__(
        self, batch_sampler: Iterable[list[Any]], seed: int, epoch: int = 0, start: int = 0, endless: bool = False
    ):
        self.batch_sampler = batch_sampler
        self.seed = seed
        self.epoch = epoch
        self.start = start
        self.endless = endless

    @property
    def sampler(self) -> Any:
        """The sampler inside; MMEngine sets its epoch."""
        return getattr(self.batch_sampler, "sampler", None)

    def __getattr__(self, name: str) -> Any:
        if name == "batch_sampler":  # not there yet, while it is copied
            raise AttributeError(name)
        return getattr(self.batch_sampler, name)

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[SeededBatch]:
        rank, world_size = get_dist_info()
        left_out, self.start = self.start, 0
        while True:
            epoch, self.epoch = self.epoch, self.epoch + 1
            seed_all("epoch", self.seed, epoch)  # of samplers that draw from the global random numbers
            if hasattr(self.sampler, "set_epoch"):
                self.sampler.set_epoch(epoch)
            batches = position = 0
            for indices in self.batch_sampler:
                if batches >= left_out:
                    # Samplers give rank r the places r, r + world_size, ... of an epoch.
                    places = range(position * world_size + rank, (position + len(indices)) * world_size, world_size)
                    yield SeededBatch(indices, [(self.seed, epoch, place) for place in places])
                batches += 1
                position += len(indices)
            if batches == 0 or batches > left_out or not self.endless:
                return
            left_out -= batches  # the whole epoch was left out: on to the next
