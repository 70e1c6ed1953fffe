"""What a network costs and what it does, as numbers."""

from .complexity import Complexity, LayerComplexity, complexity
from .gradient_conflict import ConflictRow, GradientConflict, gradient_conflict, split_gradient
from .size import ModelSize, layer_sizes, model_size
from .spatial_interaction import InteractionRow, SpatialInteractionCapability, spatial_interaction

__all__ = [
    "Complexity",
    "ConflictRow",
    "GradientConflict",
    "InteractionRow",
    "LayerComplexity",
    "ModelSize",
    "SpatialInteractionCapability",
    "complexity",
    "gradient_conflict",
    "layer_sizes",
    "model_size",
    "spatial_interaction",
    "split_gradient",
]
