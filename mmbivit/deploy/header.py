"""What the header of a packed file says: read with limits, and not to be trusted before the file is loaded."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mmbivit import __version__
from mmbivit.checks import UserError

__all__ = [
    "FORMAT",
    "FORMAT_VERSION",
    "KINDS",
    "MAX_NUMBER",
    "SUFFIX",
    "TRAINED_FORMAT",
    "PackedFile",
    "open_packed",
    "parse_header",
    "read_header",
]

FORMAT = "mmbivit.packed"
FORMAT_VERSION = 3
TRAINED_FORMAT = "mmbivit.trained"  # of networks that are not packed, see mmbivit.deploy.trained
_VERSIONS = {FORMAT: FORMAT_VERSION, TRAINED_FORMAT: 1}
KINDS = ("backbone", "classifier", "detector")
SUFFIX = ".safetensors"
_FIRST_NETWORK = "PackedSwinTransformer"  # which files of format version 1, without its name, are of
# What a whole model has beside the backbone's architecture; each is JSON.
_DESCRIPTION = ("model", "dataset_meta", "pipeline")

_MAX_JSON = 2**20  # characters; far more than the config of any detector
_MAX_DEPTH = 24
# Of any number in the metadata: no layer is as wide, and what allocates by a number before its tensors are compared
# with the file's stays small.
MAX_NUMBER = 10**6


@dataclass(frozen=True)
class PackedFile:
    """What the header of a packed file says; nothing of it is to be trusted before :func:`load` has checked it.

    Attributes:
        path: the file.
        kind: ``backbone``, ``classifier`` or ``detector``.
        mmbivit_version: version that wrote the file.
        network: name of the class of the backbone; of packed ones see :data:`mmbivit.packed.NETWORKS`.
        architecture: its options.
        model: what is around the backbone, ``None`` in a file of a backbone.
        dataset_meta: names of classes and their colours, where known.
        pipeline: the transforms of test images, where known.
        packed_layers: names of the packed layers around the backbone; files before format version 3 have none.
        tensors: dtype (safetensors' name of it) and shape of each tensor.
    """

    path: Path
    kind: str
    mmbivit_version: str
    network: str
    architecture: dict[str, Any]
    model: dict[str, Any] | None
    dataset_meta: dict[str, Any] | None
    pipeline: list[dict[str, Any]] | None
    packed_layers: list[str]
    tensors: dict[str, tuple[str, tuple[int, ...]]]


def read_header(path: str | Path) -> PackedFile:
    """Read what a packed file says of itself, without its tensors.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it is no packed file that this version can read.
    """
    with open_packed(path) as file:
        return parse_header(Path(path), file)


@contextmanager
def open_packed(
    path: str | Path, what: str = "packed file", hint: str = "make one with tools/deployment/export_packed.py"
) -> Iterator[Any]:
    """Open a file whose header safetensors has compared with its length; messages call it ``what``, and give a hint."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{what} {path} does not exist")
    try:
        file = safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as error:
        reason = str(error).splitlines()[0]
        with Path(path).open("rb") as head:
            if head.read(2) == b"PK":
                reason = "it is a checkpoint of PyTorch"
        raise UserError(f"{path} is no {what}, or not all of one ({reason}); {hint}") from error
    with file as opened:
        yield opened


def parse_header(path: Path, file: Any, expected: str = FORMAT) -> PackedFile:
    """Read the header of a file from :func:`open_packed`; raises a ValueError as :func:`read_header` does."""
    metadata = file.metadata() or {}
    if metadata.get("format") != expected:
        raise UserError(
            f"{path} is a safetensors file, but no packed network: its metadata lacks format={expected!r}; "
            "make one with tools/deployment/export_packed.py"
        )
    version = metadata.get("format_version", "")
    newest = _VERSIONS[expected]
    if not version.isdecimal() or not 1 <= int(version[:9]) <= newest:
        newer = version.isdecimal() and int(version[:9]) > newest
        hint = f"update mmbivit ({__version__} here), or export the network again" if newer else "export it again"
        raise UserError(f"{path} has format version {version[:9]!r}, this mmbivit reads 1 to {newest}: {hint}")
    kind = metadata.get("kind")
    if kind not in KINDS:
        raise UserError(f"{path} says that it is a {kind!r}; expected {', '.join(KINDS)}")
    slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  no dict
    return PackedFile(
        path=path,
        kind=kind,
        mmbivit_version=metadata.get("mmbivit_version", "unknown"),
        network=metadata.get("network", _FIRST_NETWORK),
        architecture=_parse(path, metadata, "architecture", dict),
        model=_parse(path, metadata, "model", dict) if kind != "backbone" else None,
        dataset_meta=_parse(path, metadata, "dataset_meta", dict, None),
        pipeline=_parse(path, metadata, "pipeline", list, None),
        packed_layers=_parse(path, metadata, "packed_layers", list, None) or [],
        tensors={name: (piece.get_dtype(), tuple(piece.get_shape())) for name, piece in slices.items()},
    )


def _parse(path: Path, metadata: dict[str, str], name: str, expected: type, *default: None) -> Any:
    """Return an entry of the metadata, of which only its type is checked and that it is no more than plain JSON."""
    text = metadata.get(name)
    if text is None and default:
        return default[0]
    try:
        if text is None or len(text) > _MAX_JSON:
            raise UserError("it is missing" if text is None else f"it is longer than {_MAX_JSON} characters")
        value = json.loads(text, parse_int=_integer, parse_float=_number, parse_constant=_number)
        if _depth(value) > _MAX_DEPTH:
            raise UserError("it is nested too deeply")
        if not isinstance(value, expected):
            raise UserError(f"it is a {type(value).__name__}, expected a {expected.__name__}")
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} is damaged, its {name!r} cannot be read: {reason}; export it again") from error
    return value


def _integer(text: str) -> int:
    return int(_number(text))


def _number(text: str) -> float:
    value = float(text)
    if not abs(value) <= MAX_NUMBER:  # not a number fails too
        raise UserError(f"the number {text[:20]} is out of range")
    return value


def _depth(value: Any) -> int:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, children), default=0)
