"""Registration of the packed backbone, so that a config can name it as ``mmbivit.PackedSwinTransformer``."""

from mmbivit.deploy import PackedSwinTransformer
from mmbivit.registry import MODELS

__all__ = ["PackedSwinTransformer"]

MODELS.register_module(module=PackedSwinTransformer)
