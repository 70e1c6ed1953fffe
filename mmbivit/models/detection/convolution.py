"""The binary convolution as any neck or head of MMDetection takes it: by its ``conv_cfg``."""

from collections.abc import Sequence

from mmbivit.binary import BinaryConv2d, Recipe, get_recipe
from mmbivit.checks import UserError
from mmbivit.models.stage import StagedModule, training_plan
from mmbivit.registry import MODELS

__all__ = ["StagedConv2d"]


@MODELS.register_module("BinaryConv2d")
class StagedConv2d(StagedModule, BinaryConv2d):
    """:class:`mmbivit.binary.BinaryConv2d` with the parts of a recipe, trained in stages of its own.

    In a config: ``conv_cfg=dict(type='mmbivit.BinaryConv2d', recipe='sibivit')``, with ``act_cfg=None`` where there is
    an RPReLU.

    Args:
        args, options: of :class:`mmbivit.binary.BinaryConv2d`, without its quantizers.
        recipe: a name of :data:`mmbivit.binary.RECIPES`, or a dict of changes to one; not one with float layers.
        stage1: what is binary in training stage 1 of two, ``'activations'`` (by default), ``'weights'`` or ``'all'``.
        training_stages: a plan of training in place of ``stage1``, see :class:`mmbivit.models.TrainingStage`.

    Raises:
        ValueError: for an impossible recipe or plan, or more than one group.
    """

    is_part = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *args,
        recipe: str | dict | Recipe = "sibivit",
        stage1: str | None = None,
        training_stages: Sequence[dict] | None = None,
        **options,
    ):
        recipe = get_recipe(recipe)
        if recipe.linear == "float":
            raise UserError(
                "conv_cfg: mmbivit.BinaryConv2d has a recipe with float layers; leave conv_cfg out for those"
            )
        quantizers = recipe.build_quantizers(in_channels, out_channels)
        super().__init__(in_channels, out_channels, *args, **quantizers, **options)
        self._init_stage(training_plan(stage1, training_stages))
