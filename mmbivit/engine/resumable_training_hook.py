"""Makes a run that was interrupted and resumed equal to one that was not."""

import logging
from typing import Any

from mmengine.dist import get_rank, get_world_size
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.registry import DATA_SAMPLERS
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from mmbivit.checkpoints import drop_configs
from mmbivit.checks import UserError
from mmbivit.registry import HOOKS

from .checkpoint_fields import UNITS_KEY, check_fits_run, why_not_resumable
from .seeded_batches import SeededBatchSampler, seed_all

__all__ = ["ResumableTrainingHook"]


@HOOKS.register_module()
class ResumableTrainingHook(Hook):
    """Lets a resumed run see the same data in the same order with the same random numbers as one without interruption.

    MMEngine saves weights, optimizer and schedulers, but neither the state of random numbers nor the place in the
    data: a resumed run shuffles, augments and drops paths differently. Here nothing needs to be saved, because
    everything random follows from the seed and the place in the run:

    - before each iteration, the random numbers of the model are seeded with seed, iteration and rank;
    - before each image, those of its augmentation are seeded with seed, epoch and its place in the epoch, in whatever
      worker it is loaded;
    - a run that is resumed in the middle of an epoch takes the rest of its batches, without loading the others.

    So augmentation does not depend on the number of workers, or training on how often it is validated. With one seed,
    runs on CPUs are equal to the last bit (on one number of threads); on GPUs as far as their kernels are
    (``randomness=dict(deterministic=True)``).

    Data sets without indices (``IterableDataset``) cannot be resumed in their middle. Nor, with MMEngine 0.10.7 and in
    runs that are counted in iterations, can a loader with workers that is not built from a config.
    """

    priority = "VERY_HIGH"

    def __init__(self) -> None:
        self._saved: dict[str, int] = {}

    def before_run(self, runner: Runner) -> None:
        """Note the seed that samplers were built with, as a checkpoint may have another one."""
        self._built_seed = runner.seed

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Note what the place in the run is counted in."""
        checkpoint[UNITS_KEY] = self._units(runner)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Check what the run goes on from, and keep what the place in it was counted in.

        Raises:
            ValueError: if the checkpoint is not of such a run; the message names file and field.
        """
        if not runner._resume:
            return
        drop_configs(checkpoint)
        reason = why_not_resumable(checkpoint)
        try:
            if reason is None and isinstance(runner, Runner):  # a FlexibleRunner has its strategy check
                check_fits_run(checkpoint, runner)
        except ValueError as error:
            reason = f"{error}; is it of another config?"
        if reason is not None:
            raise UserError(f"{runner._load_from} cannot be resumed: {reason}")
        self._saved = checkpoint.get(UNITS_KEY) or {}

    def before_train(self, runner: Runner) -> None:
        """Set up the data where training begins or goes on."""
        loop, loader = runner.train_loop, runner.train_dataloader
        units = self._units(runner)
        saved = self._saved if runner.iter and self._saved else units
        if saved != units:
            _warn(
                f"Resumed with {units}, where the checkpoint was saved with {saved}: data and augmentation of the rest "
                "are not what they would have been, and what is scheduled by epoch lasts longer or shorter."
            )
        if isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None:
            _warn("The data loader has no batches of indices: after a resume, data begin anew.")
            return
        endless = isinstance(loop, IterBasedTrainLoop)
        if endless and loader.num_workers and getattr(loop.dataloader_iterator, "_iterator", None) is not None:
            unused = _build_batch_sampler(runner, loader)
            if unused is None:
                _warn(
                    "Workers took batches before training began, and the data loader is not built from a config, so "
                    "that it cannot be built again: after a resume, data are not what they would have been."
                )
                return
            vars(loader).update(batch_sampler=unused)
        for sampler in (loader.sampler, getattr(loader.batch_sampler, "sampler", None)):
            if getattr(sampler, "seed", None) == self._built_seed:
                sampler.seed = runner.seed
        start = runner.iter - runner.epoch * saved["iterations_per_epoch"]
        batches = SeededBatchSampler(loader.batch_sampler, runner.seed, runner.epoch, max(0, start), endless)
        # The loader refuses a plain assignment, as an iterator that exists would go on with the old one; so none may.
        vars(loader)["batch_sampler"] = batches
        loader._iterator = None
        if endless:
            seen = 0 if hasattr(loop.dataloader_iterator, "skip_iter") else runner.iter
            loop.dataloader_iterator = _EndlessIterator(loader, seen)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Seed what the model draws in this iteration."""
        seed_all("iteration", runner.seed, runner.iter, get_rank())

    def _units(self, runner: Runner) -> dict[str, int]:
        loader = runner.train_dataloader
        by_epoch = isinstance(runner.train_loop, EpochBasedTrainLoop)
        batch_size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", 0)
        return dict(
            iterations_per_epoch=len(loader) if by_epoch else 0, images_per_iteration=get_world_size() * batch_size
        )


class _EndlessIterator:
    """The iterator of an ``IterBasedTrainLoop``, whose data begin at the right place by themselves.

    Workers start with the first batch, when all hooks have set up the loader.

    Args:
        loader: its batch sampler goes on with the next epoch when it is iterated over again.
        to_skip: batches that the loop takes only to skip them; newer versions of MMEngine call ``skip_iter`` instead.
    """

    def __init__(self, loader: DataLoader, to_skip: int):
        self._loader = loader
        self._to_skip = to_skip
        self._iterator = None

    def skip_iter(self, number: int) -> None:
        """Leave nothing to skip: it is skipped already."""
        self._to_skip = 0

    def __next__(self) -> Any:
        if self._to_skip:
            self._to_skip -= 1
            return None
        if self._iterator is None:
            self._iterator = iter(self._loader)
        try:
            return next(self._iterator)
        except StopIteration:
            self._iterator = iter(self._loader)
            return next(self._iterator)


def _build_batch_sampler(runner: Runner, loader: DataLoader) -> Any:
    """Build the batch sampler of a loader again, around the same data set; None if there is no config of it.

    MMEngine 0.10.7 starts the workers of an ``IterBasedTrainLoop`` when it builds it. They take batches at once, and
    when they are stopped, an ``InfiniteSampler`` is at its end, and batch samplers keep what they were gathering.
    """
    cfg = runner._train_dataloader
    if not isinstance(cfg, dict) or not isinstance(cfg["sampler"], dict):
        return None
    seed = getattr(loader.batch_sampler.sampler, "seed", runner.seed)
    sampler = DATA_SAMPLERS.build(cfg["sampler"], default_args=dict(dataset=loader.dataset, seed=seed))
    batches = cfg.get("batch_sampler")
    if batches is None:
        return BatchSampler(sampler, loader.batch_size, loader.drop_last)
    return DATA_SAMPLERS.build(batches, default_args=dict(sampler=sampler, batch_size=cfg["batch_size"]))


def _warn(message: str) -> None:
    print_log(message, "current", logging.WARNING)
