"""Packed networks as files: tensors in safetensors, and in its metadata all that rebuilds the network around them.

A file is data: nothing in it is unpickled, imported or called, so one from a stranger can do nothing but fail to load.
What it says of its tensors is compared with its header before anything of that size is allocated. Whole classifiers
and detectors need the MM libraries; :mod:`mmbivit.deploy.whole_models` checks and builds what their files describe.
"""

import json
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.modules import module as registration

from mmbivit import __version__, compat
from mmbivit.checks import UserError
from mmbivit.files import atomic_writer
from mmbivit.packed import NETWORKS, PackedNetwork

from .header import FORMAT, FORMAT_VERSION, SUFFIX, PackedFile, open_packed, parse_header

__all__ = ["build_filled", "load", "save"]

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


def save(packed: nn.Module, path: str | Path, config: Any = None, half: bool = False) -> None:
    """Write a packed network so that a file of this name is always whole; folders are made.

    Args:
        packed: what :func:`mmbivit.deploy.pack` returns: a backbone, a classifier or a detector.
        path: the file, ``*.safetensors``.
        config: the config (MMEngine's ``Config``, or a dict) that the whole model was built from: needed for a
            detector; a classifier's gives the transforms of its test images; of no use for a backbone.
        half: store the weights of float layers around the backbone in 16 bits; they are computed with in 32.

    Raises:
        ValueError: for a model that is not packed, another suffix, or a config that cannot be stored; it says why.
    """
    path = Path(path)
    if path.suffix != SUFFIX:
        raise UserError(f"{path}: a packed file is written in safetensors; expected a name that ends in {SUFFIX}")
    kind = _kind_of(packed)
    backbone = packed if kind == "backbone" else packed.backbone
    if type(backbone).__name__ not in NETWORKS:
        raise UserError(f"{type(backbone).__name__} is not registered as a packed network, so that no file can name it")
    description = {"architecture": backbone.options}
    if kind != "backbone":
        compat.check_dependencies()
        from .around import packed_layers  # a backbone needs none of what these import
        from .whole_models import DESCRIBERS

        description |= DESCRIBERS[kind](packed, config) | dict(packed_layers=packed_layers(packed) or None)
    # Copies, as safetensors refuses tensors that share memory; heads that share layers are stored once for each.
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in packed.state_dict().items()}
    if half:
        # What is packed lies in buffers.
        weights = (name for name, value in packed.named_parameters(remove_duplicate=False) if value.ndim > 1)
        tensors |= {name: tensors[name].half() for name in weights}
    metadata = {
        "format": FORMAT,
        # Older versions of mmbivit read a file of the second version, which has neither.
        "format_version": str(FORMAT_VERSION if half or description.get("packed_layers") else 2),
        "mmbivit_version": __version__,
        "kind": kind,
        "network": type(backbone).__name__,
        **{name: json.dumps(value, allow_nan=False) for name, value in description.items() if value is not None},
    }
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
    with open_packed(path) as file:
        header = parse_header(Path(path), file)
        network = _find_network(header)
        model = build_filled(header, file, network, _builder(header, network))
    if header.kind != "backbone":
        from .trial import TRIALS

        TRIALS[header.kind](model, header)
    return model


def _kind_of(packed: nn.Module) -> str:
    if isinstance(packed, PackedNetwork):
        return "backbone"
    if isinstance(getattr(packed, "backbone", None), PackedNetwork):
        from mmbivit.models import ImageClassifier

        return "classifier" if isinstance(packed, ImageClassifier) else "detector"
    raise UserError(f"{type(packed).__name__} is not packed: give save() what mmbivit.deploy.pack() returns")


def build_filled(header: PackedFile, file: Any, network: type[nn.Module], build: Callable[[], nn.Module]) -> nn.Module:
    """Build the network of a file, compare it with the file's tensors and load them; returns it in evaluation.

    Args:
        header: what the file says of itself.
        file: from :func:`mmbivit.deploy.header.open_packed`.
        network: class of its backbone.
        build: builds the network, with random weights.

    Raises:
        ValueError: if it cannot be built, or does not fit the tensors.
    """
    # First without memory: sizes in the metadata are anybody's, those in the header were compared with the file's.
    with _registering_at_most(1000 + 10 * len(header.tensors), header.path), torch.device("meta"):
        model = _built(header, network, build)
    _check_tensors(header, model.state_dict())
    model = _built(header, network, build)
    # Copies, so that the file may change or go afterwards.
    model.load_state_dict({name: file.get_tensor(name) for name in header.tensors})
    return model.eval()


def _builder(header: PackedFile, network: type[PackedNetwork]) -> Callable[[], nn.Module]:
    """Return what builds the packed network of a file, with random weights."""
    if header.kind == "backbone":

        def build() -> nn.Module:
            return network(**header.architecture)
    else:
        compat.check_dependencies()
        from .around import pack_around
        from .whole_models import BUILDERS

        build_model = BUILDERS[header.kind](header, dict(header.architecture, type=network))

        def build() -> nn.Module:
            model = build_model()
            return pack_around(model, model.backbone, header.packed_layers)

    return build


def _built(header: PackedFile, network: type[nn.Module], build: Callable[[], nn.Module]) -> nn.Module:
    try:
        return build()
    except Exception as error:  # of arguments that may be anything, constructors may raise anything
        reason = (str(error).splitlines() or [""])[0]
        objects = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
        of_backbone = any(isinstance(found, network) for found in objects)
        field = "architecture" if header.kind == "backbone" or of_backbone else "model"
        raise UserError(
            f"{header.path}: its {header.kind} cannot be built, as its {field!r} is damaged or of another version "
            f"({header.mmbivit_version[:20]}): {type(error).__name__}: {reason[:300]}"
        ) from error


def _find_network(header: PackedFile) -> type[PackedNetwork]:
    """Return the class of a file's backbone; raises a ``ValueError`` if it, or one of its options, is unknown."""
    network = NETWORKS.get(header.network)
    if network is None:
        raise UserError(
            f"{header.path} holds a {header.network[:64]!r}, which this version ({__version__}) does not know; "
            f"allowed: {', '.join(NETWORKS)}; update mmbivit, or export it again"
        )
    # MMEngine, which builds the backbone of a whole model, takes some keys for itself.
    unknown = header.architecture.keys() - {field.name for field in fields(network.Config)}
    if unknown:
        raise UserError(
            f"{header.path}: its architecture has {min(unknown)[:64]!r}, which this version ({__version__}) does not "
            f"know; it is damaged or of another version ({header.mmbivit_version[:20]})"
        )
    return network


@contextmanager
def _registering_at_most(count: int, path: Path) -> Iterator[None]:
    """Stop building a network at a number of layers and tensors that its file cannot fill."""
    seen = 0

    def hook(*_: Any) -> None:
        nonlocal seen
        seen += 1
        if seen > count:
            raise UserError(f"{path} describes more layers than it has tensors for")

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
            raise UserError(
                f"{path} does not fit the architecture that it describes: it {what} {len(names)} tensors, "
                f"first {min(names)!r}; export it again"
            )
    for name, tensor in expected.items():
        wanted = _DTYPES.get(tensor.dtype), tuple(tensor.shape)
        if tensors[name] not in (wanted, ("F16" if wanted[0] == "F32" else wanted[0], wanted[1])):
            raise UserError(
                f"{path} does not fit the architecture that it describes: {name!r} is {_text(*tensors[name])}, "
                f"expected {_text(*wanted)}; export it again"
            )


def _text(dtype: str | None, shape: tuple[int, ...]) -> str:
    return f"{dtype} {list(shape)}"
