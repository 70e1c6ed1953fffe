"""What a network costs."""

from .size import ModelSize, model_size

__all__ = ["ModelSize", "model_size"]
