"""The two training stages of a binary backbone (SI-BiViT, Alg. 1)."""

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from mmbivit.binary import Quantizer
from mmbivit.checkpoints.content import STAGE_KEY
from mmbivit.checks import UserError

__all__ = ["STAGE1_MODES", "StagedModule"]

STAGE1_MODES = ("activations", "weights", "all")


class StagedModule(nn.Module):
    """Mixin of backbones that are trained in two stages; ``stage`` is 1 or 2 and travels in every checkpoint.

    | | stage 1 | stage 2 |
    |---|---|---|
    | activations | binary | binary |
    | weights | float | binary |
    | SI branch | idle | active |

    With ``stage1='weights'`` it is the other way round in stage 1 (the baseline of SI-BiViT 4.1.3): binary weights,
    float activations. With ``'all'`` stage 1 is binary and whole, as stage 2 is: only distillation and what the hook
    resets at the switch tell them apart then, which shows what the float weights of stage 1 are good for. A fresh model
    is in stage 2. The parameters of both stages exist from the start: optimizer, EMA and checkpoints see one unchanging
    set of keys.
    """

    # An integer buffer is saved, loaded and broadcast like any other; the Python mirror spares a device sync.
    _STAGE_KEY = STAGE_KEY

    def _init_stage(self, stage1: str) -> None:
        """Register the stage; call at the end of ``__init__``, when all layers exist."""
        self.stage1 = stage1
        self._stage = 2
        self.register_buffer(self._STAGE_KEY, torch.tensor(2))
        self.register_load_state_dict_post_hook(_refresh_stage)

    @property
    def stage(self) -> int:
        """The training stage, 1 or 2."""
        return self._stage

    def set_stage(self, stage: int) -> tuple[int, int]:
        """Switch the parts to a stage, by what they say of themselves; calling it again changes nothing.

        A quantizer says by ``side`` of which side it is, a branch that idles in some stage names the others in
        ``active_stages``.

        Args:
            stage: 1 or 2.

        Returns:
            How many binary linear layers have binary weights now, and how many SI branches are active.

        Raises:
            ValueError: for any other stage.
        """
        if stage not in (1, 2):
            raise UserError(f"stage={stage!r} is unknown; allowed: 1, 2")
        wanted = 2 if self.stage1 == "all" else stage
        binary_layers = active_branches = 0
        for module in self.modules():
            if isinstance(module, Quantizer):
                module.binarize = wanted == 2 or self.stage1 == module.side
                binary_layers += module.binarize and module.side == "weights"
            elif (stages := getattr(module, "active_stages", None)) is not None:
                module.active = wanted in stages
                active_branches += module.active
        self._stage = stage
        self._stage_tensor().fill_(stage)
        return binary_layers, active_branches

    def _stage_tensor(self) -> Tensor:
        return getattr(self, self._STAGE_KEY)


def _refresh_stage(module: StagedModule, incompatible_keys) -> None:
    """Take the stage over from a checkpoint that was just loaded."""
    stage = int(module._stage_tensor())
    if stage == 1 != module.stage and module.stage1 != "all":
        float_part = "weights" if module.stage1 == "activations" else "activations"
        print_log(
            f"This {type(module).__name__} comes from training stage 1: its {float_part} are still float and its "
            "spatial interaction is idle. Train on to stage 2 for the 1-bit network.",
            logger="current",
            level=30,
        )
    module.set_stage(stage)
