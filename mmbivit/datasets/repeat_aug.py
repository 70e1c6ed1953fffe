"""Repeated augmentation: every image several times in an epoch, each time on another GPU."""

from collections.abc import Sized

from mmengine.dist import get_dist_info, sync_random_seed
from timm.data.distributed_sampler import RepeatAugSampler as TimmRepeatAugSampler

from mmbivit.checks import UserError, check_flag, check_integer, check_number
from mmbivit.registry import DATA_SAMPLERS

__all__ = ["RepeatAugSampler"]


@DATA_SAMPLERS.register_module()
class RepeatAugSampler(TimmRepeatAugSampler):
    """timm's sampler for repeated augmentation (Hoffer et al., CVPR 2020; DeiT) in MMEngine's runner.

    An epoch takes the first ``len(dataset)`` of all repeated images, over all ranks: as long as without repetition,
    with a ``num_repeats``-th of the different images. Order follows from ``seed + epoch``.

    Args:
        dataset: the data set to sample from.
        seed: equal on all ranks; ``None`` draws one, like MMEngine's samplers.
        shuffle: draw the order anew in each epoch.
        num_repeats: how often each image is repeated, 1 or more.
        selected_round: the epoch is rounded down to a multiple of this, 0 for no rounding.
        selected_ratio: an epoch of a rank has ``len(dataset) / selected_ratio`` images; 0 for the number of ranks.

    Raises:
        ValueError: for ``num_repeats`` below 1, or if an epoch would hold no images.
    """

    def __init__(
        self,
        dataset: Sized,
        seed: int | None = None,
        shuffle: bool = True,
        num_repeats: float = 3,
        selected_round: int = 256,
        selected_ratio: float = 0,
    ):
        check_flag("shuffle", shuffle)
        check_number("num_repeats", num_repeats, 1, 1000)
        check_integer("selected_round", selected_round, 0)
        check_number("selected_ratio", selected_ratio, 0, 1e6)
        if seed is not None:
            check_integer("seed", seed, 0)
        rank, world_size = get_dist_info()
        super().__init__(
            dataset,
            num_replicas=world_size,
            rank=rank,
            shuffle=shuffle,
            num_repeats=num_repeats,
            selected_round=selected_round,
            selected_ratio=selected_ratio,
        )
        if len(self) == 0:
            raise UserError(
                f"an epoch of RepeatAugSampler would hold no images: {len(dataset)} images, {world_size} ranks, "
                f"selected_round={selected_round}, selected_ratio={selected_ratio}; use more images, selected_round=0 "
                "or a smaller selected_ratio"
            )
        self.seed = sync_random_seed() if seed is None else seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch; timm seeds its generator with ``self.epoch``."""
        self.epoch = self.seed + epoch
