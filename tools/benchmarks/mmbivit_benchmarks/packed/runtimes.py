"""Packed inference and what it is measured against: torch, ONNX Runtime and OpenVINO, float and 8-bit integer."""

import ctypes
import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from io import StringIO
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mmbivit.models import Backbone
from mmbivit.registry import MODELS

__all__ = [
    "ONNX_NEEDS",
    "OPENVINO_NEEDS",
    "RUNTIMES",
    "Network",
    "Run",
    "Runtime",
    "Unavailable",
    "export_module",
    "reason",
    "start_onnxruntime",
    "start_openvino",
]

Run = Callable[[], Sequence[Tensor]]
CALIBRATION_BATCHES = 2


class Unavailable(Exception):
    """A runtime that does not run here; the message says why, and what to do about it."""


def reason(error: Exception) -> str:
    """Say in one line why a runtime does not run."""
    if isinstance(error, Unavailable):
        return str(error)
    lines = str(error).strip().splitlines() or ["no message"]
    return f"failed: {type(error).__name__}: {lines[0][:200]}"


@dataclass(frozen=True)
class Network:
    """A network in evaluation mode and the arguments that build one like it."""

    config: dict
    model: Backbone

    @classmethod
    def build(cls, **config) -> "Network":
        """Build the network with random weights, by default a Swin that returns all its stages."""
        config = dict(type="mmbivit.BinarySwinTransformer") | config
        if config["type"].endswith("SwinTransformer") and isinstance(config.get("arch"), dict):
            config.setdefault("out_indices", tuple(range(len(config["arch"]["depths"]))))
        return cls(config, MODELS.build(config).eval())


@dataclass(frozen=True)
class Runtime:
    """One way to compute a backbone.

    Args:
        title: what tables call it.
        kind: numbers that it computes with: ``float32``, ``bfloat16``, ``int8`` or ``1 bit``.
        export: ``export(network, images, folder)`` writes the network to a file in the folder, unless that is there
            already, and returns its path. Files may hold for images of that shape only.
        start: ``start(file, images, threads)`` loads it and returns a function of no arguments that computes the
            features of ``images``.
        packages: what must be installed.
        binary: it computes the binary network, not the float one.
    """

    title: str
    kind: str
    export: Callable[[Network, Tensor, Path], Path]
    start: Callable[[Path, Tensor, int], Run]
    packages: tuple[str, ...] = ()
    binary: bool = False

    def check(self) -> None:
        """Raise :class:`Unavailable` if a package is missing."""
        missing = [name for name in self.packages if find_spec(name) is None]
        if missing:
            raise Unavailable(f"{', '.join(missing)} not installed: pip install 'mmbivit[benchmark]'")


def export_torch(network: Network, images: Tensor, folder: Path) -> Path:
    """Write float32 weights as safetensors, with the arguments of the network as metadata."""
    file = folder / f"{network.config['recipe']}.safetensors"
    if not file.exists():
        tensors = {key: value.contiguous() for key, value in network.model.state_dict().items()}
        save_file(tensors, file, metadata=dict(config=json.dumps(network.config)))
    return file


def _load_torch(file: Path) -> Backbone:
    with safe_open(file, framework="pt") as content:
        model = MODELS.build(json.loads(content.metadata()["config"]))
        model.load_state_dict({key: content.get_tensor(key) for key in content.keys()})  # noqa: SIM118
    return model.eval()


def start_torch(file: Path, images: Tensor, threads: int) -> Run:
    """Torch as it comes, without a gradient."""
    torch.set_num_threads(threads)
    model = _load_torch(file)
    return torch.inference_mode()(lambda: model(images))


def start_compiled(file: Path, images: Tensor, threads: int) -> Run:
    """``torch.compile`` for this shape; its first call compiles, in about a minute where nothing is cached."""
    torch.set_num_threads(threads)
    compiled = torch.compile(_load_torch(file), dynamic=False)
    return torch.no_grad()(lambda: compiled(images))


def export_onnx(network: Network, images: Tensor, folder: Path) -> Path:
    """Write the network for images of this shape as one ONNX file."""
    file = folder / "float32.onnx"
    if not file.exists():
        with _quiet():
            torch.onnx.export(network.model, (images,), file, dynamo=True, external_data=False, verbose=False)
    return file


def export_module(module: torch.nn.Module, inputs: Sequence[Tensor], file: Path) -> None:
    """Write any module for inputs of these shapes as one ONNX file."""
    with _quiet():
        torch.onnx.export(module, tuple(inputs), file, dynamo=True, external_data=False, verbose=False)


def export_onnx_dynamic(network: Network, images: Tensor, folder: Path) -> Path:
    """Quantize weights to 8 bits beforehand, and the inputs of every product at run time."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    file = folder / "int8_dynamic.onnx"
    if not file.exists():
        with _quiet():
            quantize_dynamic(_prepared(network, images, folder), file, weight_type=QuantType.QInt8)
    return file


def export_onnx_static(network: Network, images: Tensor, folder: Path) -> Path:
    """Quantize the linear layers with scales from random images: right for speed, of no use for accuracy."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class RandomImages(CalibrationDataReader):
        def __init__(self) -> None:
            rng = np.random.default_rng(0)
            shapes = [images.shape] * CALIBRATION_BATCHES
            self.batches = (dict(images=rng.standard_normal(shape, np.float32)) for shape in shapes)

        def get_next(self) -> dict | None:
            return next(self.batches, None)

    file = folder / "int8_static.onnx"
    if not file.exists():
        with _quiet():
            quantize_static(
                _prepared(network, images, folder),
                file,
                RandomImages(),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=["MatMul", "Gemm"],
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                extra_options=dict(MatMulConstBOnly=True),
            )
    return file


def _prepared(network: Network, images: Tensor, folder: Path) -> Path:
    """Return the ONNX file with inferred shapes and merged operators, as ONNX Runtime's quantization wants it."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    file = folder / "prepared.onnx"
    if not file.exists():
        quant_pre_process(export_onnx(network, images, folder), file, skip_symbolic_shape=True)
    return file


def start_onnxruntime(file: Path, images: Tensor | Sequence[Tensor], threads: int) -> Run:
    """ONNX Runtime with all graph optimisations; of one input or several."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    given = [images] if isinstance(images, Tensor) else images
    inputs = {node.name: x.numpy() for node, x in zip(session.get_inputs(), given, strict=True)}
    return lambda: [torch.from_numpy(output) for output in session.run(None, inputs)]


def start_openvino(precision: str | None, file: Path, images: Tensor | Sequence[Tensor], threads: int) -> Run:
    """OpenVINO for one request at a time, input and outputs shared, not copied; ``precision`` of all that is float."""
    import openvino

    core = openvino.Core()
    if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise Unavailable("this CPU has no bfloat16 arithmetic")
    settings = dict(PERFORMANCE_HINT="LATENCY", INFERENCE_NUM_THREADS=threads)
    if precision is not None:
        settings["INFERENCE_PRECISION_HINT"] = precision
    with _kept_signal_stack():
        request = core.compile_model(file, "CPU", settings).create_infer_request()
    for i, x in enumerate([images] if isinstance(images, Tensor) else images):
        request.set_input_tensor(i, openvino.Tensor(x.numpy(), shared_memory=True))
    return lambda: [torch.from_numpy(value) for value in request.infer(share_outputs=True).values()]


def export_packed(network: Network, images: Tensor, folder: Path) -> Path:
    """Write the packed network."""
    from mmbivit import deploy

    file = folder / "packed.safetensors"
    if not file.exists():
        deploy.save(deploy.pack(network.model), file)
    return file


def start_packed(file: Path, images: Tensor, threads: int) -> Run:
    """Packed inference as users get it: the file is all that is needed."""
    from mmbivit import deploy

    torch.set_num_threads(threads)
    model = deploy.load(file).eval()
    return torch.inference_mode()(lambda: model(images))


@contextmanager
def _kept_signal_stack() -> Iterator[None]:
    """Give this thread its signal stack back.

    OpenVINO replaces it by one that is freed with the network, but by any thread; the next signal would be deadly.
    """
    if sys.platform != "linux":
        yield
        return
    libc, before = ctypes.CDLL(None), ctypes.create_string_buffer(24)  # of struct stack_t
    libc.sigaltstack(None, before)
    try:
        yield
    finally:
        libc.sigaltstack(before, None)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what exporters say on every run out of the benchmark's output; errors are raised, not logged."""
    level = logging.root.manager.disable
    try:
        logging.disable(logging.WARNING)
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


ONNX_NEEDS = ("onnx", "onnxscript", "onnxruntime")
OPENVINO_NEEDS = ("onnx", "onnxscript", "openvino")
RUNTIMES = {
    "torch": Runtime("torch eager", "float32", export_torch, start_torch),
    "compile": Runtime("torch.compile", "float32", export_torch, start_compiled),
    "onnxruntime": Runtime("ONNX Runtime", "float32", export_onnx, start_onnxruntime, ONNX_NEEDS),
    "openvino": Runtime("OpenVINO", "float32", export_onnx, partial(start_openvino, "f32"), OPENVINO_NEEDS),
    "openvino-bf16": Runtime("OpenVINO bf16", "bfloat16", export_onnx, partial(start_openvino, "bf16"), OPENVINO_NEEDS),
    "onnxruntime-int8": Runtime("ONNX Runtime int8", "int8", export_onnx_dynamic, start_onnxruntime, ONNX_NEEDS),
    # What is 8-bit is in the file; for the rest OpenVINO takes what it likes, bfloat16 where the CPU has it.
    "openvino-int8": Runtime(
        "OpenVINO int8", "int8", export_onnx_static, partial(start_openvino, None), (*OPENVINO_NEEDS, "onnxruntime")
    ),
    "simulated": Runtime("simulated binary", "1 bit", export_torch, start_torch, binary=True),
    "packed": Runtime("packed", "1 bit", export_packed, start_packed, binary=True),
}
