"""Child registries of MMEngine's roots, scope ``mmbivit``.

``type='mmbivit.X'`` works in any MM config without ``custom_imports``: MMEngine imports this module by its scope
name and then the ``locations`` on the first look-up. It stays trivial, because import errors here are swallowed.
"""

import importlib
from collections.abc import Sequence
from typing import Any

from mmengine.registry import DATA_SAMPLERS as MMENGINE_DATA_SAMPLERS
from mmengine.registry import DATASETS as MMENGINE_DATASETS
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import METRICS as MMENGINE_METRICS
from mmengine.registry import MODEL_WRAPPERS as MMENGINE_MODEL_WRAPPERS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import OPTIM_WRAPPERS as MMENGINE_OPTIM_WRAPPERS
from mmengine.registry import TRANSFORMS as MMENGINE_TRANSFORMS
from mmengine.registry import Registry


class _ModelRegistry(Registry):
    """Imports further locations only for a name that nothing else has: they need MMDetection, classifiers do not."""

    def __init__(self, *args: Any, later: Sequence[str], **options: Any):
        super().__init__(*args, **options)
        self._later = later

    def get(self, key: str) -> Any:
        if (found := super().get(key)) is None:
            for location in self._later:
                importlib.import_module(location)
            found = super().get(key)
        return found


MODELS = _ModelRegistry(
    "model",
    parent=MMENGINE_MODELS,
    scope="mmbivit",
    locations=["mmbivit.models", "mmbivit.distill"],
    later=["mmbivit.models.detection"],
)
HOOKS = Registry("hook", parent=MMENGINE_HOOKS, scope="mmbivit", locations=["mmbivit.engine"])
DATASETS = Registry("dataset", parent=MMENGINE_DATASETS, scope="mmbivit", locations=["mmbivit.datasets"])
DATA_SAMPLERS = Registry("data sampler", parent=MMENGINE_DATA_SAMPLERS, scope="mmbivit", locations=["mmbivit.datasets"])
TRANSFORMS = Registry("transform", parent=MMENGINE_TRANSFORMS, scope="mmbivit", locations=["mmbivit.datasets"])
METRICS = Registry("metric", parent=MMENGINE_METRICS, scope="mmbivit", locations=["mmbivit.evaluation"])
MODEL_WRAPPERS = Registry(
    "model_wrapper", parent=MMENGINE_MODEL_WRAPPERS, scope="mmbivit", locations=["mmbivit.engine"]
)
OPTIM_WRAPPERS = Registry(
    "optim_wrapper", parent=MMENGINE_OPTIM_WRAPPERS, scope="mmbivit", locations=["mmbivit.engine"]
)
