"""Capture the outputs of modules by forward hooks that can be removed."""

from collections.abc import Mapping

from torch import Tensor, nn

__all__ = ["FeatureRecorder", "backbone_blocks"]


def backbone_blocks(backbone: nn.Module) -> dict[str, nn.Module]:
    """Return the transformer blocks of a Swin backbone, mmdet's or ours, by name (``stages.0.blocks.1``).

    Raises:
        ValueError: if the backbone has no ``stages`` with ``blocks``.
    """
    blocks = {
        f"stages.{i}.blocks.{j}": block
        for i, stage in enumerate(getattr(backbone, "stages", ()))
        for j, block in enumerate(getattr(stage, "blocks", ()))
    }
    if not blocks:
        raise ValueError(f"{type(backbone).__name__} has no stages with blocks, so there are no outputs to distil")
    return blocks


class FeatureRecorder:
    """Records the outputs of some modules while it is entered as a context.

    Args:
        modules: what to record, by name. Each must return one tensor.

    Example:
        >>> recorder = FeatureRecorder(backbone_blocks(model.backbone))
        >>> with recorder:
        ...     model(images)
        >>> recorder.features["stages.0.blocks.0"]
        >>> recorder.remove()
    """

    def __init__(self, modules: Mapping[str, nn.Module]):
        self.features: dict[str, Tensor] = {}
        self._active = False
        # Closures: a deep copy of a hooked model, such as EMA's, must not drag a copy of the recorder along.
        self._handles = [module.register_forward_hook(self._make_hook(name)) for name, module in modules.items()]

    def _make_hook(self, name: str):
        def record(module: nn.Module, args: tuple, output: Tensor) -> None:
            if self._active:
                self.features[name] = output

        return record

    def __enter__(self) -> "FeatureRecorder":
        self.features = {}
        self._active = True
        return self

    def __exit__(self, *exc_info) -> None:
        self._active = False

    def pop(self) -> dict[str, Tensor]:
        """Return the features and forget them, so that nothing holds their graph."""
        features, self.features = self.features, {}
        return features

    def remove(self) -> None:
        """Remove the hooks from the modules."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.features = {}
