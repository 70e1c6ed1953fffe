"""Trained networks that are not packed, as files: tensors in safetensors, and in its metadata what rebuilds them.

They are laid out and checked as packed files are (:mod:`mmbivit.deploy.serialization`), with the class of a
:class:`mmbivit.models.Backbone` and its arguments in place of a packed network's. :mod:`mmbivit.hub` reads and writes
them.
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from mmengine.registry import DefaultScope
from torch import nn

from mmbivit import __version__
from mmbivit.checks import UserError
from mmbivit.files import atomic_writer
from mmbivit.models import Backbone, ImageClassifier
from mmbivit.registry import MODELS

from .harmless import check_options
from .header import TRAINED_FORMAT, PackedFile, open_packed, parse_header
from .serialization import build_filled
from .trial import TRIALS
from .whole_models import classifier_builder, describe_classifier

__all__ = ["load_trained", "save_trained"]


def save_trained(model: nn.Module, path: str | Path, config: Any, image: torch.Tensor) -> None:
    """Write a backbone or a classifier of ours, binary or float, of any training stage.

    Args:
        model: the network; it is not changed.
        path: the file.
        config: the config that it was built from: MMEngine's ``Config`` of the run, its ``model``, or a backbone's.
            Of a run's, the transforms of test images are stored with a classifier.
        image: a batch on which the network and one that is built from the config have to agree.

    Raises:
        ValueError: for another kind of model, a config that cannot be stored, or one of another model.
    """
    backbone = model.backbone if isinstance(model, ImageClassifier) else model
    if not isinstance(backbone, Backbone):
        what = (
            f"{type(model).__name__} with a {type(backbone).__name__}"
            if backbone is not model
            else type(model).__name__
        )
        raise UserError(
            f"a {what} cannot be stored as it is; a backbone or classifier of mmbivit can, or what pack() returns"
        )
    architecture = _architecture(model, config)
    check_options(architecture, "backbone")
    kind = "classifier" if backbone is not model else "backbone"
    run = config if config.get("model") else None
    description = describe_classifier(model, run) if isinstance(model, ImageClassifier) else {}
    state = {name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}
    _check_is_of(backbone, architecture, image)
    metadata = {
        "format": TRAINED_FORMAT,
        "format_version": "1",
        "mmbivit_version": __version__,
        "kind": kind,
        "network": type(backbone).__name__,
        "architecture": json.dumps(architecture, allow_nan=False),
        **{name: json.dumps(value, allow_nan=False) for name, value in description.items() if value is not None},
    }
    with atomic_writer(path) as file:
        file.write(safetensors.torch.save(state, metadata))


def load_trained(path: str | Path) -> nn.Module:
    """Load what :func:`save_trained` wrote, in evaluation and on the CPU, as :func:`mmbivit.deploy.load` loads.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it is truncated, foreign, of a newer format, or does not fit what it says of itself.
    """
    with open_packed(path) as file:
        header = parse_header(Path(path), file, TRAINED_FORMAT)
        network = _find_network(header)
        try:
            check_options(header.architecture, "architecture")
        except ValueError as error:
            raise UserError(f"{header.path} is not loaded: {error}") from error
        model = build_filled(header, file, network, _builder(header, network))
    if header.kind == "classifier":
        TRIALS["classifier"](model, header)
    return model


def _architecture(model: nn.Module, config: Any) -> dict[str, Any]:
    """Return the arguments of a model's backbone in its config, as JSON has them."""
    config = config.get("model", config) if hasattr(config, "get") else config
    if isinstance(model, ImageClassifier):
        config = config.get("backbone") if hasattr(config, "get") else None
    name = type(model.backbone if isinstance(model, ImageClassifier) else model).__name__
    if not isinstance(config, dict) or str(config.get("type")).rpartition(".")[2] != name:
        raise UserError(
            f"a {type(model).__name__} that is not packed is stored with its config: dict(type={name!r}, ...)"
        )
    options = {key: value for key, value in config.items() if key not in ("type", "init_cfg", "_scope_")}
    try:
        return json.loads(json.dumps(options, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise UserError(
            f"the config of {name} cannot be stored as JSON: {error}; give recipes by name, or as a dict"
        ) from error


def _find_network(header: PackedFile) -> type[Backbone]:
    known = {
        found.__name__: found
        for found in MODELS.module_dict.values()
        if isinstance(found, type) and issubclass(found, Backbone)
    }
    if header.kind == "detector" or header.network not in known:
        raise UserError(
            f"{header.path} holds a {header.kind} with a {header.network[:64]!r}, which this version ({__version__}) "
            f"does not know; allowed: backbones and classifiers with {', '.join(known)}"
        )
    return known[header.network]


def _builder(header: PackedFile, network: type[Backbone]) -> Callable[[], nn.Module]:
    if header.kind == "backbone":

        def build() -> nn.Module:
            return network(**header.architecture)
    else:
        build = classifier_builder(header, dict(header.architecture, type=network))

    def bounded() -> nn.Module:
        model = build()
        # Tables of indices grow faster than the tensors of a file that ask for them.
        if sum(buffer.nbytes for buffer in model.buffers()) > 2**28 + 8 * header.path.stat().st_size:
            raise UserError("it takes far more memory than the file has bytes")
        return model

    return bounded


@torch.no_grad()
def _check_is_of(backbone: Backbone, architecture: dict[str, Any], image: torch.Tensor) -> None:
    """Raise a ValueError unless a network of these arguments computes the same, given the same weights."""
    where = f"the config is not the one that this {type(backbone).__name__} was built from"
    with DefaultScope.overwrite_default_scope("mmengine"), torch.random.fork_rng(devices=[]):
        twin = type(backbone)(**architecture).eval()
    given = copy.deepcopy(backbone).cpu().eval()
    shapes = {key: value.shape for key, value in given.state_dict().items()}
    for key, value in twin.state_dict().items():
        if shapes.pop(key, None) != value.shape:
            raise UserError(f"{where}: with it, {key} has the shape {tuple(value.shape)}")
    if shapes:
        raise UserError(f"{where}: with it, there is no {min(shapes)}")
    twin.load_state_dict(given.state_dict())
    if not all(torch.equal(ours, theirs) for ours, theirs in zip(given(image), twin(image), strict=True)):
        raise UserError(f"{where}: with it, the outputs differ")
