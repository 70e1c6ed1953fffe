"""Converting whole checkpoint files between our key names and timm's, with an account of every key.

Loading needs none of this (see :mod:`mmbivit.checkpoints`): a converted file is for publishing, for other programs,
and for looking at what a foreign file holds.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor

from mmbivit.checkpoints import FETCHED_SCHEMES, load_checkpoint_file, save_atomically
from mmbivit.checkpoints.content import STAGE_KEY, find_prefix, find_state_dict
from mmbivit.checkpoints.names.swin import (
    BINARY_ONLY,
    count_stages,
    find_family,
    head_name,
    own_names,
    own_value,
    timm_name,
)
from mmbivit.checks import UserError
from mmbivit.files import check_writable
from mmbivit.models import BinarySwinTransformer

__all__ = ["TARGETS", "Conversion", "check_destination", "convert_checkpoint", "convert_state_dict", "to_timm"]

TARGETS = ("mmbivit", "timm")
MAX_STAGES = 8  # of any network; names in a file may say more
_PREFIX = "backbone."


@dataclass(frozen=True)
class Conversion:
    """The converted weights of a Swin, and what became of each key.

    Attributes:
        source: the file, URL or timm name; of a file without its folder.
        family: whose names the source has: ``timm``, ``official``, ``mmdet`` or ``mmbivit``.
        arch: ``embed_dims``, ``depths``, ``num_heads``, ``window_size``, ``mlp_ratio`` and ``patch_size``, as
            :class:`BinarySwinTransformer` takes them, as far as the weights show them.
        state_dict: the converted weights.
        mapped: old name -> new name.
        skipped: old name -> why it is not needed.
        unplaced: old names of the backbone that a Swin network does not have.
        missing: names (ours, without prefix) that a Swin network has and the source lacks.
        target: whose names ``state_dict`` has, ``mmbivit`` or ``timm``.
        dataset_meta: class names and the like, if the source has them along with a head.
    """

    source: str
    family: str
    arch: dict[str, Any]
    state_dict: dict[str, Tensor]
    mapped: dict[str, str]
    skipped: dict[str, str]
    unplaced: list[str]
    missing: list[str]
    target: str = "mmbivit"
    dataset_meta: dict[str, Any] = field(default_factory=dict)

    @property
    def num_classes(self) -> int | None:
        """Classes of the head, ``None`` without one."""
        weight = self.state_dict.get("head.fc.weight" if self.target == "timm" else "head.weight")
        return None if weight is None else len(weight)

    def save(self, destination: str | Path, overwrite: bool = False, allow_unplaced: bool = False) -> None:
        """Write the weights; as a plain state dict for timm, otherwise with ``meta`` beside them.

        Raises:
            ValueError: if keys have no place, unless ``allow_unplaced``; or the file exists, unless ``overwrite``.
        """
        if self.unplaced and not allow_unplaced:
            raise UserError(
                f"{len(self.unplaced)} keys of {self.source} have no place in a Swin network, first "
                f"{self.unplaced[0]}: is it of another architecture, such as Swin v2? "
                "With --allow-unplaced they are left out"
            )
        check_destination(destination, overwrite)
        meta = dict(source=self.source, family=self.family, arch=self.arch)
        if self.dataset_meta:
            meta["dataset_meta"] = self.dataset_meta
        content = self.state_dict if self.target == "timm" else dict(meta=meta, state_dict=self.state_dict)
        save_atomically(content, destination)

    def report(self, verbose: bool = False) -> RenderableType:
        """Return what a terminal shows: architecture, counts, keys without a place; with ``verbose`` every key."""
        parts: list[RenderableType] = []
        if verbose:
            table = Table("key", f"{self.target}'s key, or why it is not needed", highlight=False)
            for old, new in [*self.mapped.items(), *self.skipped.items()]:
                table.add_row(Text(old, overflow="fold"), Text(new, overflow="fold"))
            parts.append(table)
        arch = ", ".join(f"{name}={value}" for name, value in self.arch.items())
        head = f"head of {self.num_classes} classes" if self.num_classes else "no head"
        parts.append(Text(f"{self.source}: Swin with {self.family}'s names, {head}; {arch}"))
        reasons = ", ".join(f"{count} {reason}" for reason, count in Counter(self.skipped.values()).items())
        parts.append(
            Text(
                f"{len(self.mapped)} keys mapped, {len(self.skipped)} skipped{f' ({reasons})' if reasons else ''}, "
                f"{len(self.unplaced)} without a place, {len(self.missing)} missing"
            )
        )
        parts += [Text(f"without a place: {key}", overflow="fold") for key in self.unplaced]
        parts += [Text(f"missing: {key}", overflow="fold") for key in self.missing]
        return Group(*parts)


def check_destination(destination: str | Path, overwrite: bool = False) -> None:
    """Refuse to write over a file, or where nothing can be written.

    Raises:
        OSError: if the file could not be written.
        ValueError: if the file exists, unless ``overwrite``.
    """
    path = Path(destination)
    if path.is_dir() or (path.exists() and not overwrite):
        hint = "give a file name" if path.is_dir() else "give another name, or --overwrite"
        raise UserError(f"{destination} exists already; {hint}")
    check_writable("DST", destination)


def convert_checkpoint(source: str, to: str = "mmbivit", prefix: str | None = None) -> Conversion:
    """Convert a checkpoint; :meth:`Conversion.save` writes the result.

    Args:
        source: file, URL or ``timm://`` name of a Swin with timm's, the official, mmdet's or our key names.
        to: whose names the result gets, ``'mmbivit'`` or ``'timm'``.
        prefix: what the backbone's keys start with; by default ``'backbone.'`` if any key has it.

    Raises:
        FileNotFoundError: if there is no such file, or it cannot be downloaded.
        ValueError: if it is no Swin checkpoint, or binary and meant for timm.
    """
    if to not in TARGETS:
        raise UserError(f"to={to!r} is unknown; allowed: {', '.join(map(repr, TARGETS))}")
    checkpoint = load_checkpoint_file(source)
    name = str(source) if str(source).startswith(FETCHED_SCHEMES) else Path(source).name
    conversion = convert_state_dict(find_state_dict(checkpoint), name, prefix)
    if conversion.num_classes and isinstance(meta := checkpoint.get("meta"), dict):
        conversion = replace(conversion, dataset_meta=meta.get("dataset_meta") or {})
    return to_timm(conversion) if to == "timm" else conversion


def convert_state_dict(state_dict: dict[str, Tensor], source: str, prefix: str | None = None) -> Conversion:
    """Bring a state dict under the names of :class:`mmbivit.models.ImageClassifier`: ``backbone.*``, ``head.*``.

    Raises:
        ValueError: if it is none of a Swin.
    """
    if not _is_state_dict(state_dict):
        raise UserError(
            f"{source} holds no state dict: expected tensors by name, or that under 'state_dict' or 'model'"
        )
    state_dict = {key.removeprefix("module."): value for key, value in state_dict.items()}
    prefix = find_prefix(state_dict, prefix)
    converted, mapped, skipped, backbone = {}, {}, {}, {}
    for key, value in state_dict.items():
        name = head_name(key.removeprefix(prefix))
        if name in ("head.weight", "head.bias"):
            converted[name], mapped[key] = value, name
        elif key.startswith(prefix):
            backbone[key.removeprefix(prefix)] = value
        else:
            skipped[key] = "not of the backbone"
    _shape(converted, "head.weight", 2)
    num_stages, family = count_stages(backbone), find_family(backbone)
    if not 1 <= num_stages <= MAX_STAGES:
        raise UserError(
            f"{source} is of another architecture: no key of a Swin's blocks, such as layers.0.blocks.0.norm1.weight, "
            f"is among its {len(backbone)} keys, such as {', '.join(list(backbone)[:2])}"
        )
    names = {key: key for key in backbone} if family == "mmbivit" else own_names(backbone, num_stages)
    skipped |= {prefix + key: "the network computes it" for key in backbone if key not in names}
    depths = _depths(names.values(), num_stages)
    known = _network_names(names.values(), depths)
    placed = {key: name for key, name in names.items() if name in known or _is_own_binary(name, family)}
    own = {name: own_value(name, backbone[key], family) for key, name in placed.items()}
    mapped |= {prefix + key: _PREFIX + name for key, name in placed.items()}
    # Float weights of others are those of a finished network.
    converted |= {_PREFIX + name: value for name, value in ({STAGE_KEY: torch.tensor(2)} | own).items()}
    return Conversion(
        source=source,
        family=family,
        arch=_find_arch(own, depths),
        state_dict=converted,
        mapped=mapped,
        skipped=skipped,
        unplaced=[prefix + key for key in names if key not in placed],
        missing=sorted(_network_names(names.values(), depths, required=True) - set(own)),
    )


def to_timm(conversion: Conversion) -> Conversion:
    """Bring a conversion under timm's names: a plain state dict that timm's Swin of this arch loads strictly.

    Raises:
        ValueError: if the network is binary, or lacks tensors of timm's.
    """
    source = conversion.source
    if any(map(BINARY_ONLY.search, conversion.state_dict)):
        raise UserError(f"{source} is of a binary network, which timm has not; --to timm takes float checkpoints only")
    if conversion.missing:
        raise UserError(
            f"{source} lacks {len(conversion.missing)} tensors of timm's Swin, first {conversion.missing[0]}; "
            "--to timm needs a backbone with the last stage's norm"
        )
    num_stages = len(conversion.arch["depths"])
    state_dict, mapped, skipped, unplaced = {}, {}, dict(conversion.skipped), list(conversion.unplaced)
    for old, own in conversion.mapped.items():
        if (new := timm_name(own.removeprefix(_PREFIX), num_stages)) is not None:
            state_dict[new], mapped[old] = conversion.state_dict[own], new
        elif own.endswith("absolute_pos_embed"):
            unplaced.append(old)
        else:
            skipped[old] = "timm has the last stage's norm only" if ".norm" in own else "timm has no training stages"
    return replace(conversion, state_dict=state_dict, mapped=mapped, skipped=skipped, unplaced=unplaced, target="timm")


def _is_state_dict(content: Any) -> bool:
    return isinstance(content, dict) and all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    )


def _network_names(names: Iterable[str], depths: tuple[int, ...], required: bool = False) -> set[str]:
    """Return all keys that a float Swin may have; with ``required`` those that the one with these names must have.

    Names do not depend on widths, so a network of one channel shows them.
    """
    names = set(names)
    network = BinarySwinTransformer(
        arch=dict(embed_dims=1, depths=depths, num_heads=(1,) * len(depths)),
        recipe="float",
        mlp_ratio=1,
        window_size=1,
        pretrain_img_size=4,
        out_indices=(len(depths) - 1,) if required else range(len(depths)),
        qkv_bias=not required or any(name.endswith(".attn.qkv.bias") for name in names),
        patch_norm=not required or "patch_embed.norm.weight" in names,
        use_abs_pos_embed=not required,
    )
    return set(network.state_dict()) - ({STAGE_KEY} if required else set())


def _is_own_binary(name: str, family: str) -> bool:
    return family == "mmbivit" and BINARY_ONLY.search(name) is not None


def _depths(names: Iterable[str], num_stages: int) -> tuple[int, ...]:
    """Return the blocks of each stage; longer numbers are of no network, and their keys get no place in this one."""
    matches = filter(None, (re.match(r"stages\.(\d)\.blocks\.(\d{1,3})\.", name) for name in names))
    depths = [1] * num_stages
    for stage, block in (map(int, match.groups()) for match in matches):
        if stage < num_stages:
            depths[stage] = max(depths[stage], block + 1)
    return tuple(depths)


def _find_arch(state_dict: dict[str, Tensor], depths: tuple[int, ...]) -> dict[str, Any]:
    """Return the arguments of :class:`BinarySwinTransformer` that weights with our names show."""
    arch: dict[str, Any] = dict(depths=depths)
    patches = _shape(state_dict, "patch_embed.proj.weight", 4)
    fc1 = _shape(state_dict, "stages.0.blocks.0.mlp.fc1.weight", 2)
    table = "stages.{}.blocks.0.attn.relative_position_bias_table"
    shapes = (_shape(state_dict, table.format(i), 2) for i in range(len(depths)))
    tables = [shape for shape in shapes if shape is not None]
    if patches is not None:
        arch = dict(embed_dims=patches[0], **arch, patch_size=patches[-1])
    if fc1 is not None:
        arch["mlp_ratio"] = fc1[0] / fc1[1]
    if len(tables) == len(depths):
        arch["num_heads"] = tuple(table[1] for table in tables)
        arch["window_size"] = (round(tables[0][0] ** 0.5) + 1) // 2
    return arch


def _shape(state_dict: dict[str, Tensor], key: str, ndim: int) -> tuple[int, ...] | None:
    """Return the shape of a tensor of ``ndim`` axes, none of them empty, or ``None`` where there is no such key.

    Raises:
        ValueError: if it has other axes.
    """
    shape = None if key not in state_dict else tuple(state_dict[key].shape)
    if shape is not None and (len(shape) != ndim or 0 in shape):
        raise UserError(f"the checkpoint is damaged: {key} has shape {shape}, expected {ndim} axes")
    return shape
