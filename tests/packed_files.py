"""Helpers for tests of packed files."""

import copy
import json
from pathlib import Path

import safetensors.torch
import torch
from mmengine.registry import MODELS, DefaultScope
from safetensors import safe_open

from mmbivit.apis import load_config


def trained(config: Path, checkpoint: Path, classes: tuple[str, ...], scope: str) -> torch.nn.Module:
    """Build the model of a config with random weights and statistics, and write its checkpoint as MMEngine does."""
    torch.manual_seed(0)  # what uses it has the scope of a module, so the tests' own seed comes too late
    generator = torch.Generator().manual_seed(0)
    with DefaultScope.overwrite_default_scope(scope):
        model = MODELS.build(copy.deepcopy(load_config(config).model)).eval()
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():  # thresholds too: at exactly 0 many signs hang on the order of sums
            tensor.add_(0.1 * torch.rand(tensor.shape, generator=generator))
    model.dataset_meta = dict(classes=classes)
    torch.save(dict(meta=dict(dataset_meta=model.dataset_meta), state_dict=model.state_dict()), checkpoint)
    return model


def content(file: Path) -> tuple[dict[str, str], dict[str, list]]:
    """Return metadata and tensors of a packed file; safetensors writes the first in any order."""
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    return metadata, {name: tensor.tolist() for name, tensor in safetensors.torch.load_file(file).items()}


def changed(file: Path, folder: Path, tensors: dict | None = None, **metadata: object) -> Path:
    """Write a packed file again with other metadata, given as JSON values."""
    with safe_open(file, "pt") as opened:
        old = opened.metadata()
    new = old | {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    state = safetensors.torch.load_file(file) | (tensors or {})
    safetensors.torch.save_file(state, folder / "changed.safetensors", new)
    return folder / "changed.safetensors"
