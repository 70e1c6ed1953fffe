"""Weights of other networks and implementations.

Pre-load hooks (:func:`register_key_mapping` of a backbone, :func:`register_classifier_key_mapping` of a classifier)
rename and fit what is loaded, so that ``load_state_dict``, MMEngine's ``load_from`` and ``init_cfg`` all accept float
weights of other implementations, for float and binary networks.
"""

import logging
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from mmengine.logging import print_log
from torch import Tensor, nn

from mmbivit.checks import UserError

from .content import (
    BINARY_ONLY,
    COMPUTED,
    OF_RECIPE,
    STAGE_KEY,
    binary_keys,
    check_tensor,
    find_prefix,
    find_state_dict,
    is_float_for,
)
from .names import head_name, join_heads

__all__ = ["load_pretrained", "register_classifier_key_mapping", "register_key_mapping"]


def load_pretrained(module: nn.Module, checkpoint: dict[str, Any], prefix: str | None = None) -> tuple[list, list]:
    """Load the weights of a checkpoint into a backbone.

    Args:
        module: the backbone.
        checkpoint: as :func:`load_checkpoint_file` returns it.
        prefix: what the backbone's keys start with in the checkpoint, such as ``'backbone.'``; by default
            ``'backbone.'`` is removed if any key has it.

    Returns:
        Keys of the backbone that the checkpoint lacks, and keys of the checkpoint that the backbone lacks.

    Raises:
        ValueError: if no key starts with ``prefix``, or the checkpoint is of another architecture.
    """
    state_dict = {key.removeprefix("module."): value for key, value in find_state_dict(checkpoint).items()}
    prefix = find_prefix(state_dict, prefix)
    state_dict = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
    try:
        missing, unexpected = module.load_state_dict(state_dict, strict=False)
    except RuntimeError as error:
        if not str(error).startswith("Error(s) in loading state_dict"):  # torch's list of what does not fit
            raise
        raise UserError(str(error).strip().splitlines()[-1].strip()) from error
    return [key for key in missing if not key.endswith("num_batches_tracked")], unexpected


def register_key_mapping(module: nn.Module, names: ModuleType | None, convert_foreign: bool = True) -> None:
    """Make a backbone accept the state dicts of other implementations, and refuse other architectures.

    Before each load the keys below the backbone's prefix are

    - renamed from the names of other implementations, with the layout of tensors;
    - fitted: what its family fits, such as Swin's position bias tables of another window size, is; where a float
      network initialises a binary one, the MLP units of largest norm are kept, LayerNorm's affine goes into BatchNorm,
      and what only the binary network has stays as it is;
    - matched to ``out_indices``: norms of stages that this network does not return are left out, and where a
      classifier's backbone (which has the last norm only) initialises a detector's, the other norms stay as they are;
    - compared with the network's shapes.

    Args:
        module: a :class:`mmbivit.models.Backbone`.
        names: of weights in other implementations, a module of :mod:`mmbivit.checkpoints.names`; ``None`` for none.
        convert_foreign: rename foreign keys; otherwise they stay unexpected.

    Raises:
        ValueError: on load, if a block or a shape shows another architecture; it names the first such key.
    """

    def hook(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_) -> None:
        own = {key[len(prefix) :]: state_dict.pop(key) for key in list(state_dict) if key.startswith(prefix)}
        current = module.state_dict()
        foreign = names is not None and convert_foreign and names.is_foreign(own)
        if foreign and names is not None:
            heads = [next(_heads(stage), 0) for stage in module.stages]
            own = names.to_own_keys(own, heads)
        from_float = is_float_for(module, own)
        if foreign:
            own[STAGE_KEY] = current[STAGE_KEY]
        if own:
            _match_output_norms(own, current, len(module.stages))
            _fit(own, current, names, from_float)
        if own and not from_float:
            _check_recipe(own, current)
        if own and from_float:
            _start_fresh(own, current, binary_keys(module))
        state_dict.update({prefix + key: value for key, value in own.items()})

    module.register_load_state_dict_pre_hook(hook)


def _heads(stage: nn.Module) -> Iterator[int]:
    return (module.num_heads for module in stage.modules() if hasattr(module, "num_heads"))


def register_classifier_key_mapping(module: nn.Module) -> None:
    """Make a classifier accept whole float classifiers of other implementations.

    Before each load, keys of a bare network (none starts with ``backbone.``) are put under ``backbone.``, where the
    hook of the backbone renames them, ``head.fc.`` becomes ``head.``, and two heads (distilled DeiT) one.

    Args:
        module: a :class:`mmbivit.models.ImageClassifier`, with a ``backbone`` and a linear ``head``.

    Raises:
        ValueError: on load, if the head has another number of classes.
    """

    def hook(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_) -> None:
        own = {key[len(prefix) :]: state_dict.pop(key) for key in list(state_dict) if key.startswith(prefix)}
        if not any(key.startswith("backbone.") for key in own):
            parts = (*dict(module.named_children()), "head_dist")
            own = {key if key.partition(".")[0] in parts else f"backbone.{key}": value for key, value in own.items()}
        own = join_heads({head_name(key): value for key, value in own.items()})
        weight = own.get("head.weight")
        if isinstance(weight, Tensor) and weight.ndim and len(weight) != module.head.out_features:
            raise UserError(
                f"the checkpoint's head has {len(weight)} classes, this model num_classes={module.head.out_features}; "
                f"give num_classes={len(weight)}, or load the backbone alone with model.backbone.init_cfg"
            )
        state_dict.update({prefix + key: value for key, value in own.items()})

    module.register_load_state_dict_pre_hook(hook)


def _match_output_norms(state_dict: dict[str, Tensor], current: dict[str, Tensor], num_stages: int) -> None:
    """Drop norms of stages that the network does not return; where only the last was trained, keep its other ones."""
    given, wanted = ({i for i in range(num_stages) if f"norm{i}.weight" in keys} for keys in (state_dict, current))
    for key in [key for i in given - wanted for key in state_dict if key.startswith(f"norm{i}.")]:
        del state_dict[key]
    fresh = [f"norm{i}" for i in sorted(wanted - given)] if num_stages - 1 in given else []
    for name in fresh:
        state_dict.update({key: value for key, value in current.items() if key.startswith(f"{name}.")})
    if fresh:
        names = ", ".join(fresh)
        print_log(f"The checkpoint has the last stage's norm only, as classifiers do: {names} start fresh.", "current")


def _fit(state_dict: dict[str, Tensor], current: dict[str, Tensor], names: ModuleType | None, from_float: bool) -> None:
    """Fit a state dict with our own keys to the network's tensors, in place."""
    if not any(key in current for key in state_dict):
        raise UserError(f"the checkpoint is of another arch: none of its keys, such as {next(iter(state_dict))}, fits")
    for key, value in state_dict.items():
        if key in current:
            check_tensor(key, value)
            if names is not None:
                state_dict[key] = names.fit_tensor(key, value, current[key])
    if from_float:
        _keep_largest_units(state_dict, current)
        _drop_normed_biases(state_dict, current)
    for key, value in state_dict.items():
        expected = current[key].shape if key in current else None
        if expected is None and key.startswith("stages.") and not BINARY_ONLY.search(key):
            raise UserError(f"the checkpoint is of another arch: it has {key}, which this network has not")
        if expected is not None and value.shape != expected:
            raise UserError(
                f"the checkpoint is of another arch: {key} has shape {tuple(value.shape)}, "
                f"this network expects {tuple(expected)}; check arch, mlp_ratio, window_size and spatial_interaction"
            )


def _check_recipe(state_dict: dict[str, Tensor], current: dict[str, Tensor]) -> None:
    """Refuse a binary network whose quantizers, norms of layers or shortcuts are others than this network's."""
    given, wanted = ({key for key in keys if OF_RECIPE.search(key)} for keys in (state_dict, current))
    where = "the checkpoint is of another recipe"
    for key in sorted(given - wanted):
        raise UserError(f"{where}: it has {key}, which this network has not; give the network the checkpoint's recipe")
    for key in sorted(wanted - given):
        raise UserError(f"{where}: it lacks {key}, which this network has; give the network the checkpoint's recipe")


def _start_fresh(state_dict: dict[str, Tensor], current: dict[str, Tensor], keys: list[str]) -> None:
    """Keep the network's own tensors of these keys where a float network has none, in place, and say so."""
    for key in keys:
        state_dict.setdefault(key, current[key])
    # Nothing is missing then, so that MMEngine has no warning of its own.
    print_log(
        "The weights are of a float network, this one is binary: thresholds, spatial interaction and statistics "
        "start fresh. It has to be trained before its predictions mean anything.",
        "current",
        logging.WARNING,
    )


def _drop_normed_biases(state_dict: dict[str, Tensor], current: dict[str, Tensor]) -> None:
    """Drop the biases of layers that have none here, because a norm of theirs would subtract it."""
    for key in [key for key in state_dict if key.endswith(".bias") and key not in current]:
        if f"{key.removesuffix('bias')}norm.bias" in current:
            del state_dict[key]


def _keep_largest_units(state_dict: dict[str, Tensor], current: dict[str, Tensor]) -> None:
    """Cut the hidden layer of each MLP to the network's width, keeping the units of largest norm in their order.

    Where its tensors do not fit each other they stay as they are, too large for the network.
    """
    for key in [key for key in state_dict if key.endswith(".mlp.fc1.weight") and key in current]:
        names = [key, key.replace("fc1.weight", "fc1.bias"), key.replace("fc1.weight", "fc2.weight")]
        if not all(name in state_dict and state_dict[name].dtype in COMPUTED for name in names):
            continue
        fc1, bias, fc2 = (state_dict[name] for name in names)
        width, units = len(current[key]), fc1.shape[:1]
        if fc1.ndim != 2 or fc2.ndim != 2 or bias.shape != units or fc2.shape[1:] != units or len(fc1) <= width:
            continue
        keep = (fc1.norm(dim=1) * fc2.norm(dim=0)).topk(width).indices.sort().values
        for name, value in zip(names, (fc1[keep], bias[keep], fc2[:, keep]), strict=True):
            state_dict[name] = value
