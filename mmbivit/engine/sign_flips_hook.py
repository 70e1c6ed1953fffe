"""How many binary weights change their sign while a network trains."""

from typing import Any

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch import Tensor

from mmbivit.binary import BinaryLayer, num_bytes, pack_bits, unpack_bits
from mmbivit.checks import UserError, check_integer
from mmbivit.registry import HOOKS

from .checkpoint_fields import SIGNS_KEY
from .unwrapping import unwrapped_model

__all__ = ["SignFlipsHook"]

PREFIX = "sign_flips"


@HOOKS.register_module()
class SignFlipsHook(Hook):
    """Logs which share of the binary weights has another sign than the last time it looked (weight oscillation).

    A sign is that of ``W - mean(W)`` per output channel (SI-BiViT, Eq. 4). In stage 1, where weights are float, it is
    the sign that they would have. The log gets ``sign_flips``, of all weights, and ``sign_flips/<layer>`` for each
    layer, from 0 to 1. What was seen last is kept in checkpoints, 1 bit a weight, so a resumed run logs the same.

    Args:
        interval: iterations between two looks; ``None`` for once an epoch, which needs an epoch-based loop.

    Raises:
        ValueError: if ``interval`` is no positive integer, if it is missing in a run by iterations, or if the model has
            no binary layer; the last two before training.
    """

    priority = "NORMAL"  # before checkpoints are written

    def __init__(self, interval: int | None = None):
        if interval is not None:
            check_integer("interval", interval, 1)
        self.interval = interval
        self._signs: dict[str, Tensor] = {}
        self._loaded: dict[str, Tensor] | None = None

    def before_train(self, runner: Runner) -> None:
        """Look for the first time, unless a checkpoint knows what was seen last."""
        if self.interval is None and not isinstance(runner.train_loop, EpochBasedTrainLoop):
            raise UserError("SignFlipsHook: set interval, in iterations, for a run that has no epochs")
        signs = weight_signs(runner)
        if not signs:
            raise UserError("SignFlipsHook: the model has no layer with binary weights")
        self._signs, loaded, self._loaded = signs, self._loaded, None
        for name, packed in (loaded or {}).items():  # earlier releases had words of int32, which are not taken over
            if name in signs and _packed_like(packed, signs[name]):
                self._signs[name] = unpack_bits(packed, signs[name].shape[1]).to(signs[name].device)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Look every ``interval`` iterations."""
        if self.interval is not None and self.every_n_train_iters(runner, self.interval):
            self._look(runner, runner.iter + 1)  # the loop counts it after this

    def after_train_epoch(self, runner: Runner) -> None:
        """Look at the end of an epoch."""
        if self.interval is None:
            self._look(runner, runner.iter)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Keep what was seen last."""
        checkpoint[SIGNS_KEY] = {name: pack_bits(signs).cpu() for name, signs in self._signs.items()}

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Take over what was seen last; a checkpoint of a run without this hook has nothing."""
        self._loaded = checkpoint.get(SIGNS_KEY)

    def _look(self, runner: Runner, iterations: int) -> None:
        if not is_main_process():
            return
        signs, before = weight_signs(runner), self._signs
        self._signs = signs
        flips = {name: int((signs[name] != before[name]).sum()) for name in signs}
        shares = {f"{PREFIX}/{name}": count / signs[name].numel() for name, count in flips.items()}
        total = sum(flips.values()) / sum(map(Tensor.numel, signs.values()))
        runner.visualizer.add_scalars({PREFIX: total, **shares, "iter": iterations}, step=iterations)


def _packed_like(packed: Tensor, signs: Tensor) -> bool:
    return packed.dtype == torch.uint8 and packed.shape == (len(signs), num_bytes(signs.shape[1]))


@torch.no_grad()
def weight_signs(runner: Runner) -> dict[str, Tensor]:
    """Return where each binary layer's weights are or would be positive, ``(out_features, in_features)``, by name."""
    layers = {n: m for n, m in unwrapped_model(runner).named_modules() if isinstance(m, BinaryLayer)}
    return {name: layer.folded_weight()[0] for name, layer in layers.items()}
