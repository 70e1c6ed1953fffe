"""Packed networks as files: tensors in safetensors, and in its metadata all that rebuilds the network around them.

A file is data: nothing in it is unpickled, imported or called, so one from a stranger can do nothing but fail to load.
What it says of its tensors is compared with its header before anything of that size is allocated. Whole classifiers
and detectors need the MM libraries; :mod:`mmbivit.apis.packed_config` checks and builds what their files describe.
"""

import inspect
import json
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules import module as registration

from mmbivit import __version__
from mmbivit.files import atomic_writer

__all__ = ["FORMAT", "FORMAT_VERSION", "KINDS", "SUFFIX", "PackedFile", "load", "read_header", "save"]

FORMAT = "mmbivit.packed"
FORMAT_VERSION = 1
KINDS = ("backbone", "classifier", "detector")
SUFFIX = ".safetensors"
# What a whole model has beside the backbone's architecture; each is JSON.
_DESCRIPTION = ("model", "dataset_meta", "pipeline")

_MAX_JSON = 2**20  # characters; far more than the config of any detector
_MAX_DEPTH = 24
# Of any number in the metadata: no layer is as wide, and what allocates by a number before its tensors are compared
# with the file's stays small.
MAX_NUMBER = 10**6
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class PackedFile:
    """What the header of a packed file says; nothing of it is to be trusted before :func:`load` has checked it.

    Attributes:
        path: the file.
        kind: ``backbone``, ``classifier`` or ``detector``.
        mmbivit_version: version that wrote the file.
        architecture: arguments of :class:`PackedSwinTransformer`.
        model: what is around the backbone, ``None`` in a file of a backbone.
        dataset_meta: names of classes and their colours, where known.
        pipeline: the transforms of test images, where known.
        tensors: dtype (safetensors' name of it) and shape of each tensor.
    """

    path: Path
    kind: str
    mmbivit_version: str
    architecture: dict[str, Any]
    model: dict[str, Any] | None
    dataset_meta: dict[str, Any] | None
    pipeline: list[dict[str, Any]] | None
    tensors: dict[str, tuple[str, tuple[int, ...]]]


def save(packed: nn.Module, path: str | Path, config: Any = None) -> None:
    """Write a packed network so that a file of this name is always whole; folders are made.

    Args:
        packed: what :func:`mmbivit.deploy.pack` returns: a backbone, a classifier or a detector.
        path: the file, ``*.safetensors``.
        config: the config (MMEngine's ``Config``, or a dict) that the whole model was built from: needed for a
            detector; a classifier's gives the transforms of its test images; of no use for a backbone.

    Raises:
        ValueError: for a model that is not packed, another suffix, or a config that cannot be stored; it says why.
    """
    path = Path(path)
    if path.suffix != SUFFIX:
        raise ValueError(f"{path}: a packed file is written in safetensors; expected a name that ends in {SUFFIX}")
    kind = _kind_of(packed)
    backbone = packed if kind == "backbone" else packed.backbone
    description = {"architecture": backbone.config}
    if kind != "backbone":
        from mmbivit.apis import packed_config

        description |= getattr(packed_config, f"describe_{kind}")(packed, config)
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "mmbivit_version": __version__,
        "kind": kind,
        **{name: json.dumps(value, allow_nan=False) for name, value in description.items() if value is not None},
    }
    # Copies, as safetensors refuses tensors that share memory; heads that share layers are stored once for each.
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in packed.state_dict().items()}
    with atomic_writer(path) as file:
        file.write(safetensors.torch.save(tensors, metadata))


def load(path: str | Path) -> nn.Module:
    """Load what :func:`save` wrote, in eval mode and on the CPU.

    A backbone needs torch and safetensors alone, a classifier MMEngine and timm, a detector MMDetection. A whole model
    has ``dataset_meta`` and, as mmdet's own functions expect it, ``cfg`` with the transforms of its test images; it has
    predicted a tiny image then.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it is truncated, foreign, of a newer format, does not fit what it says of itself, or fails on an
            image.
    """
    with _open(path) as file:
        header = _read(Path(path), file)
        build = _builder(header)
        # First without memory: sizes in the metadata are anybody's, those in the header were compared with the file's.
        with _registering_at_most(1000 + 10 * len(header.tensors), header.path), torch.device("meta"):
            expected = build().state_dict()
        _check_tensors(header, expected)
        model = build()
        # Copies, so that the file may change or go afterwards.
        model.load_state_dict({name: file.get_tensor(name) for name in header.tensors})
    model.eval()
    if header.kind != "backbone":
        from mmbivit.apis import packed_trial

        getattr(packed_trial, f"try_{header.kind}")(model, header)
    return model


def read_header(path: str | Path) -> PackedFile:
    """Read what a packed file says of itself, without its tensors.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it is no packed file that this version can read.
    """
    with _open(path) as file:
        return _read(Path(path), file)


def _kind_of(packed: nn.Module) -> str:
    from .swin import PackedSwinTransformer

    if isinstance(packed, PackedSwinTransformer):
        return "backbone"
    if isinstance(getattr(packed, "backbone", None), PackedSwinTransformer):
        from mmbivit.models import ImageClassifier

        return "classifier" if isinstance(packed, ImageClassifier) else "detector"
    raise ValueError(f"{type(packed).__name__} is not packed: give save() what mmbivit.deploy.pack() returns")


@contextmanager
def _open(path: str | Path) -> Iterator[Any]:
    """Open a file whose header safetensors has compared with its length."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"packed file {path} does not exist")
    try:
        file = safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as error:
        reason = str(error).splitlines()[0]
        with Path(path).open("rb") as head:
            if head.read(2) == b"PK":
                reason = "it is a checkpoint of PyTorch"
        raise ValueError(
            f"{path} is no packed file, or not all of one ({reason}); make one with tools/deployment/export_packed.py"
        ) from error
    with file as opened:
        yield opened


def _read(path: Path, file: Any) -> PackedFile:
    metadata = file.metadata() or {}
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path} is a safetensors file, but no packed network: its metadata lacks format={FORMAT!r}; "
            "make one with tools/deployment/export_packed.py"
        )
    version = metadata.get("format_version", "")
    if not version.isdecimal() or not 1 <= int(version[:9]) <= FORMAT_VERSION:
        newer = version.isdecimal() and int(version[:9]) > FORMAT_VERSION
        hint = f"update mmbivit ({__version__} here), or export the network again" if newer else "export it again"
        raise ValueError(f"{path} has format version {version[:9]!r}, this mmbivit reads {FORMAT_VERSION}: {hint}")
    kind = metadata.get("kind")
    if kind not in KINDS:
        raise ValueError(f"{path} says that it is a {kind!r}; expected {', '.join(KINDS)}")
    slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  no dict
    return PackedFile(
        path=path,
        kind=kind,
        mmbivit_version=metadata.get("mmbivit_version", "unknown"),
        architecture=_parse(path, metadata, "architecture", dict),
        model=_parse(path, metadata, "model", dict) if kind != "backbone" else None,
        dataset_meta=_parse(path, metadata, "dataset_meta", dict, None),
        pipeline=_parse(path, metadata, "pipeline", list, None),
        tensors={name: (piece.get_dtype(), tuple(piece.get_shape())) for name, piece in slices.items()},
    )


def _parse(path: Path, metadata: dict[str, str], name: str, expected: type, *default: None) -> Any:
    """Return an entry of the metadata, of which only its type is checked and that it is no more than plain JSON."""
    text = metadata.get(name)
    if text is None and default:
        return default[0]
    try:
        if text is None or len(text) > _MAX_JSON:
            raise ValueError("it is missing" if text is None else f"it is longer than {_MAX_JSON} characters")
        value = json.loads(text, parse_int=_integer, parse_float=_number, parse_constant=_number)
        if _depth(value) > _MAX_DEPTH:
            raise ValueError("it is nested too deeply")
        if not isinstance(value, expected):
            raise ValueError(f"it is a {type(value).__name__}, expected a {expected.__name__}")
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} is damaged, its {name!r} cannot be read: {reason}; export it again") from error
    return value


def _integer(text: str) -> int:
    return int(_number(text))


def _number(text: str) -> float:
    value = float(text)
    if not abs(value) <= MAX_NUMBER:  # not a number fails too
        raise ValueError(f"the number {text[:20]} is out of range")
    return value


def _depth(value: Any) -> int:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, children), default=0)


def _builder(header: PackedFile) -> Callable[[], nn.Module]:
    """Return what builds the network of a file, with random weights; it raises a ``ValueError`` of one line."""
    from .swin import PackedSwinTransformer

    # MMEngine, which builds the backbone of a whole model, takes some keys for itself.
    unknown = header.architecture.keys() - inspect.signature(PackedSwinTransformer).parameters
    if unknown:
        raise ValueError(
            f"{header.path}: its architecture has {min(unknown)[:64]!r}, which this version ({__version__}) does not "
            f"know; it is damaged or of another version ({header.mmbivit_version[:20]})"
        )
    if header.kind == "backbone":

        def build() -> nn.Module:
            return PackedSwinTransformer(**header.architecture)
    else:
        from mmbivit.apis import packed_config

        build = getattr(packed_config, f"{header.kind}_builder")(header)

    def checked() -> nn.Module:
        try:
            return build()
        except Exception as error:  # of arguments that may be anything, constructors may raise anything
            reason = (str(error).splitlines() or [""])[0]
            objects = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
            of_backbone = any(isinstance(found, PackedSwinTransformer) for found in objects)
            field = "architecture" if header.kind == "backbone" or of_backbone else "model"
            raise ValueError(
                f"{header.path}: its {header.kind} cannot be built, as its {field!r} is damaged or of another version "
                f"({header.mmbivit_version[:20]}): {type(error).__name__}: {reason[:300]}"
            ) from error

    return checked


@contextmanager
def _registering_at_most(count: int, path: Path) -> Iterator[None]:
    """Stop building a network at a number of layers and tensors that its file cannot fill."""
    seen = 0

    def hook(*_: Any) -> None:
        nonlocal seen
        seen += 1
        if seen > count:
            raise ValueError(f"{path} describes more layers than it has tensors for")

    handles = [
        registration.register_module_module_registration_hook(hook),
        registration.register_module_parameter_registration_hook(hook),
        registration.register_module_buffer_registration_hook(hook),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_tensors(header: PackedFile, expected: dict[str, Tensor]) -> None:
    """Compare the tensors of a file with those of the network that it describes: the kernels rely on shapes."""
    path, tensors = header.path, header.tensors
    for names, what in ((expected.keys() - tensors.keys(), "lacks"), (tensors.keys() - expected.keys(), "also has")):
        if names:
            raise ValueError(
                f"{path} does not fit the architecture that it describes: it {what} {len(names)} tensors, "
                f"first {min(names)!r}; export it again"
            )
    for name, tensor in expected.items():
        wanted = _DTYPES.get(tensor.dtype), tuple(tensor.shape)
        if tensors[name] != wanted:
            raise ValueError(
                f"{path} does not fit the architecture that it describes: {name!r} is {_text(*tensors[name])}, "
                f"expected {_text(*wanted)}; export it again"
            )


def _text(dtype: str | None, shape: tuple[int, ...]) -> str:
    return f"{dtype} {list(shape)}"
