"""What several processes of one training have to agree on, and keep agreeing on."""

import zlib
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import all_gather_object, all_reduce_params
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import nn

from mmbivit.checks import UserError
from mmbivit.registry import HOOKS

__all__ = ["RanksHook", "check_same_config", "check_same_on_all_ranks"]


@HOOKS.register_module()
class RanksHook(Hook):
    """Keeps the processes of a distributed training together; ``tools/train.py --launcher`` adds it.

    Before training, all must be about to do the same iterations with the same weights: a process with fewer batches
    would leave the others waiting, and one that found no checkpoint would train another network. After each iteration,
    the running statistics of BatchNorm, which each process takes from its own images, are averaged. DDP leaves them
    apart: without this each process would evaluate another network, and checkpoints would hold what rank 0 has seen. An
    average per iteration equals one at the end, the update being linear, so that nothing depends on when a checkpoint
    is written. It runs before ``EMAHook`` copies the statistics.

    Raises:
        ValueError: on all processes, if they do not agree.
    """

    priority = "ABOVE_NORMAL"

    def before_train(self, runner: Runner) -> None:
        """Compare where the processes start and how far they go."""
        start = {"first iteration": runner.iter, "checksum of the weights": _checksum(runner.model)}
        check_same_on_all_ranks(start, "give every process the checkpoint to resume from")
        check_same_on_all_ranks(
            {"iterations to train": runner.max_iters},
            "give every process as many batches: set round_up=True in the sampler of the train_dataloader",
        )

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Average the running statistics that were updated."""
        norms = [m for m in runner.model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
        norms = [norm for norm in norms if norm.track_running_stats]
        all_reduce_params([buffer for norm in norms for buffer in (norm.running_mean, norm.running_var)], op="mean")


def check_same_config(cfg: Config) -> None:
    """Check that all processes have the same config; paths may differ in their folders.

    Raises:
        ValueError: on all processes, naming the first key that differs.
    """
    check_same_on_all_ranks(dict(_leaves(cfg.to_dict())), "start all processes with the same config and options")


def check_same_on_all_ranks(values: Mapping[str, Any], advice: str) -> None:
    """Compare values between the processes.

    Args:
        values: what to compare, by name.
        advice: what to do if they differ, for the error's message.

    Raises:
        ValueError: on all processes, naming the first value that differs.
    """
    ranks = all_gather_object(dict(values))
    for name in dict.fromkeys(name for rank in ranks for name in rank):
        first, *others = (rank.get(name, "not set") for rank in ranks)
        for i, value in enumerate(others, 1):
            if value != first:
                raise UserError(
                    f"the processes of this run differ, {name}: {first} on rank 0, {value} on rank {i}; {advice}"
                )


def _checksum(model: nn.Module) -> int:
    checksum = 0
    for parameter in model.parameters():
        content = parameter.detach().cpu().reshape(-1).contiguous().view(torch.uint8)
        checksum = zlib.crc32(content.numpy(), checksum)
    return checksum


def _leaves(node: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a config by dotted key; of paths the last part."""
    if isinstance(node, (Mapping, list, tuple)):
        for key, value in node.items() if isinstance(node, Mapping) else enumerate(node):
            yield from _leaves(value, f"{name}.{key}" if name else str(key))
    elif node is None or isinstance(node, (bool, int, float)):
        yield name, node
    elif isinstance(node, str) and name not in ("work_dir", "experiment_name"):
        yield name, PurePath(node).name
