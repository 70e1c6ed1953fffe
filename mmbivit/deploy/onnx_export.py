"""ONNX files of the simulated binary network, for runtimes that know no bits, checked against torch."""

import copy
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmbivit.binary import ActivationQuantizer, BinaryLinear, SoftmaxThreshold
from mmbivit.checks import UserError, check_integer
from mmbivit.files import atomic_writer, check_writable
from mmbivit.models import Backbone
from mmbivit.models.observation import observed

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["TIE", "TOLERANCE", "OnnxComparison", "check_options", "compare_with_torch", "plain_copy", "write_onnx"]

OPSET = 18  # which torch translates to directly; newer runtimes read it as well
INPUT = "images"
TOLERANCE = 1e-4  # of outputs, relative to the largest magnitude
TIE = 1e-5  # how close to its threshold a value is whose bit rounding may flip, relative to the largest magnitude


@dataclass(frozen=True)
class OnnxComparison:
    """How an ONNX file compares with torch on one random batch.

    Two runtimes add in different orders. Where a value meets its threshold up to rounding, they may then disagree about
    a bit, and all that follows from it differs, through no fault of the file. So where outputs differ, torch computes
    them a second time with each bit as ONNX Runtime has it: bits may then differ only at such ties, and outputs not
    at all.

    Attributes:
        error: largest difference of an output over its largest magnitude, with the same bits in both runtimes.
        bits: bits that were compared, 0 where outputs agreed right away.
        flipped: bits that differed, each one a tie.
        margin: largest distance of a flipped value from its threshold, over the largest magnitude of its tensor.
        share: share of output values that differed by more than :data:`TOLERANCE` while each runtime had its own bits.
    """

    error: float
    bits: int = 0
    flipped: int = 0
    margin: float = 0.0
    share: float = 0.0

    def __str__(self) -> str:
        if not self.flipped:
            return f"outputs agree with torch, largest relative error {self.error:.1e}"
        return (
            f"{self.flipped} of {self.bits} bits differ from torch's, all at ties (at most {self.margin:.1e} from the "
            f"threshold); with equal bits outputs agree, largest relative error {self.error:.1e}; each with its own "
            f"bits, {self.share:.2%} of the values differ by more than {TOLERANCE:g}"
        )


def write_onnx(
    network: nn.Module,
    out: str | Path,
    *,
    size: tuple[int, int],
    batch_size: int | None = None,
    check: bool = True,
) -> OnnxComparison | None:
    """Write a trained classifier, or a backbone, as an ONNX file of standard operators.

    The file computes in float32 what the simulated network computes: weights are stored binarized, as floats. Its input
    is ``images`` ``(B, in_channels, H, W)``, normalised as by the classifier's or detector's data preprocessor; its
    outputs are a classifier's ``logits`` ``(B, num_classes)``, or a backbone's feature maps ``stage0``, ...
    ``(B, C_i, H_i, W_i)``.

    Args:
        network: a :class:`mmbivit.models.Backbone` in its last stage, or a classifier with one. It is not changed.
        out: file to write, ending in ``.onnx``; it is replaced if it exists.
        size: height and width of the images in pixels, fixed in the file.
        batch_size: images per run, fixed in the file; ``None`` for any number.
        check: compare the file with torch on a random image, in ONNX Runtime.

    Returns:
        The comparison, or ``None`` without ``check``.

    Raises:
        OSError: if ``out`` cannot be written.
        ValueError: if a package is missing, an argument has no sense, the network is another one or not in its last
            stage, or the outputs differ from torch's; nothing is written then.
    """
    check_options(out, size, batch_size, check)
    backbone = getattr(network, "backbone", network)
    if not isinstance(backbone, Backbone):
        raise UserError(
            f"{type(backbone).__name__} cannot be exported; only backbones of mmbivit and their classifiers"
        )
    if backbone.stage != backbone.last_stage:
        raise UserError(
            f"{type(backbone).__name__} is in training stage {backbone.stage}, where it is not all binary; train on to "
            f"stage {backbone.last_stage}, then export"
        )
    if (stride := backbone.strides[0]) > min(size):
        raise UserError(f"--size {size[0]} {size[1]} is less than a patch of {stride} x {stride} pixels")
    names = [f"stage{i}" for i in network.out_indices] if network is backbone else ["logits"]
    plain = plain_copy(network)
    # With a single image, torch would take the batch size for a constant. Mean and variance are of normalised images.
    shape = (2 if batch_size is None else batch_size, backbone.in_channels, *size)
    example = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    graph = _to_onnx(plain, example, names, dynamic_batch=batch_size is None)
    comparison = compare_with_torch(graph, network, plain, example[: batch_size or 1]) if check else None
    with atomic_writer(Path(out)) as file:
        file.write(_without_bits(graph, len(names)))
    return comparison


def check_options(out: str | Path, size: tuple[int, int], batch_size: int | None, check: bool) -> None:
    """Check what :func:`write_onnx` is told, before a network is loaded for it; raises as that does."""
    needed = ("onnx", "onnxscript", "onnxruntime") if check else ("onnx", "onnxscript")
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise UserError(f"ONNX export needs {', '.join(missing)}: pip install 'mmbivit[benchmark]'")
    if Path(out).suffix != ".onnx":
        raise UserError(f"OUT {out}: expected a name that ends in .onnx")
    if len(size) != 2 or not all(isinstance(pixels, int) and pixels > 0 for pixels in size):
        raise UserError(f"--size {' '.join(map(str, size))}; expected height and width in pixels, such as 224 224")
    if batch_size is not None:
        check_integer("--batch-size", batch_size, 1)
    check_writable("OUT", out)


def plain_copy(network: nn.Module) -> nn.Module:
    """Copy a trained network without what only training needs: binary layers become a comparison and a linear layer.

    Weights are binarized once, in the copy. It computes exactly the same.

    Raises:
        ValueError: naming the layer and the class, if a quantizer of activations is no comparison with thresholds.
    """
    plain = copy.deepcopy(network).eval().requires_grad_(False)
    for path, module in list(plain.named_modules()):
        if isinstance(module, BinaryLinear):
            continue  # it is replaced with its quantizers
        for name, child in module.named_children():
            where = f"{path}.{name}".lstrip(".")
            if isinstance(child, BinaryLinear):
                if type(child) is not BinaryLinear:
                    raise UserError(f"{where} cannot be exported: only BinaryLinear can, it is {type(child).__name__}")
                linear = _Linear(child.effective_weight().detach(), child.bias)
                sign = _plain_quantizer(f"{where}.input_quantizer", child.input_quantizer)
                setattr(module, name, nn.Sequential(sign, linear))
            elif isinstance(child, ActivationQuantizer):
                setattr(module, name, _plain_quantizer(where, child))
    return plain


def _plain_quantizer(name: str, quantizer: ActivationQuantizer) -> nn.Module:
    """Return the comparison that a quantizer folds into."""
    try:
        folded: Any = quantizer.fold()  # thresholds, or the ratio of attention
    except ValueError as error:
        raise UserError(f"{name} cannot be exported: {error}") from error
    if isinstance(quantizer, SoftmaxThreshold):
        return _SelectKeys(folded, quantizer.divide)
    return _Sign(folded.float())


def compare_with_torch(graph: "ModelProto", network: nn.Module, plain: nn.Module, images: Tensor) -> OnnxComparison:
    """Compare a graph in ONNX Runtime with torch; see :class:`OnnxComparison`.

    Args:
        graph: the outputs of ``plain``, then its bits.
        network: what was exported.
        plain: its :func:`plain_copy`.
        images: ``(B, in_channels, H, W)``.

    Raises:
        ValueError: if outputs differ and no ties explain it.
    """
    run = _onnx_runtime(graph, images)
    with torch.inference_mode():
        expected = _outputs(network(images))
        names = [output.name for output in graph.graph.output]
        actual = run(names[: len(expected)])
        error = _relative_error(actual, expected)
        if error <= TOLERANCE:
            return OnnxComparison(error)
        values = run(names)
        actual, bits = values[: len(expected)], values[len(expected) :]
        share = _share_of_differences(actual, expected)
        with _forced_bits(plain, bits) as ties:
            error = _relative_error(actual, _outputs(plain(images)))
    flipped, margin = ties
    if not (flipped and margin <= TIE and error <= TOLERANCE):
        raise UserError(
            f"ONNX Runtime and torch disagree, and ties do not explain it: {flipped} bits differ, up to {margin:.1e} "
            f"from their threshold (allowed: {TIE:g}), and with equal bits outputs differ by {error:.1e} "
            f"(allowed: {TOLERANCE:g}). Nothing was written; try other versions of torch, onnx and onnxruntime"
        )
    return OnnxComparison(error, sum(map(Tensor.numel, bits)), flipped, margin, share)


class _AtLeast(nn.Module):
    """Every bit of the network is made here, where hooks can see it and its threshold, and change it."""

    def forward(self, x: Tensor, threshold: Tensor) -> Tensor:
        return x >= threshold


class _Sign(nn.Module):
    """``Sign(x - gamma)`` without a gradient: ``(*, C) -> (*, C)``."""

    def __init__(self, gamma: Tensor):
        super().__init__()
        self.register_buffer("gamma", gamma.detach().clone())
        self.at_least = _AtLeast()

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(self.at_least(x, self.gamma), 1.0, -1.0)


class _SelectKeys(nn.Module):
    """:class:`mmbivit.binary.SoftmaxThreshold` without a gradient."""

    def __init__(self, ratio: float, divide: bool):
        super().__init__()
        self.ratio = ratio
        self.divide = divide
        self.at_least = _AtLeast()

    def forward(self, scores: Tensor) -> Tensor:
        probabilities = scores.softmax(dim=-1)
        threshold = self.ratio * probabilities.amax(dim=-1, keepdim=True)
        selected = self.at_least(probabilities, threshold).to(scores.dtype)
        return selected / selected.sum(dim=-1, keepdim=True) if self.divide else selected


class _Linear(nn.Module):
    """Linear layer of given weights ``(out_features, in_features)``."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class _WithBits(nn.Module):
    """Returns the outputs of a plain network, then its bits in the order in which they are made."""

    def __init__(self, plain: nn.Module):
        super().__init__()
        self.plain = plain

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        bits: list[Tensor] = []
        with observed(_bit_makers(self.plain), lambda name, args, output: bits.append(output)):
            outputs = _outputs(self.plain(images))
        return (*outputs, *bits)


def _bit_makers(plain: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in plain.named_modules() if isinstance(module, _AtLeast)}


@contextmanager
def _forced_bits(plain: nn.Module, bits: Sequence[Tensor]) -> Iterator[list]:
    """Give a plain network these bits instead of its own.

    Yields:
        How many bits differed from its own, and the largest distance of such a value from its threshold, over the
        largest magnitude of its tensor; both grow while the network runs.
    """
    given = iter(bits)
    ties = [0, 0.0]

    def replace(name: str, args: tuple[Tensor, Tensor], output: Tensor) -> Tensor:
        x, threshold = args
        bits = next(given)
        if (differs := bits != output).any():
            distance = (x - threshold).abs()[differs].max() / x.abs().max()
            ties[:] = ties[0] + int(differs.sum()), max(ties[1], float(distance))
        return bits

    with observed(_bit_makers(plain), replace):
        yield ties


def _to_onnx(plain: nn.Module, example: Tensor, names: list[str], dynamic_batch: bool) -> "ModelProto":
    """Export a plain network with the bits as further outputs, and make sure that all operators are standard ones."""
    program = torch.onnx.export(
        _WithBits(plain).eval(),
        (example,),
        dynamo=True,
        input_names=[INPUT],
        output_names=names,
        opset_version=OPSET,
        dynamic_shapes=({0: torch.export.Dim("batch")},) if dynamic_batch else None,
        verbose=False,
    )
    graph = program.model_proto  # type: ignore[union-attr]  # dynamo=True returns one
    domains = {opset.domain for opset in graph.opset_import} | {node.domain for node in graph.graph.node}
    if domains - {"", "ai.onnx"} or graph.functions:
        raise RuntimeError(f"the exported graph has operators that are not standard, of {sorted(domains)}")
    if dynamic_batch and not graph.graph.input[0].type.tensor_type.shape.dim[0].dim_param:
        raise UserError("the network's code takes the batch size for a constant, as len(x) does; fix it: --batch-size")
    return graph


def _without_bits(graph: "ModelProto", num_outputs: int) -> bytes:
    """Serialise a graph with its first outputs only; all of its nodes are needed for those."""
    import onnx

    final = onnx.ModelProto()
    final.CopyFrom(graph)
    del final.graph.output[num_outputs:]
    content = final.SerializeToString()
    onnx.checker.check_model(content)
    return content


def _onnx_runtime(graph: "ModelProto", images: Tensor) -> Callable[[list[str]], list[Tensor]]:
    """Return a function that computes outputs by name, on as many threads as torch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda names: [torch.from_numpy(value) for value in session.run(names, {INPUT: images.numpy()})]


def _relative_error(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest difference over the largest magnitude; NaN if any value is."""
    errors = [(a - b).abs().max() / b.abs().max() for a, b in zip(actual, expected, strict=True)]
    return float(torch.stack(errors).max())


def _share_of_differences(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    differ = [((a - b).abs() > TOLERANCE * b.abs().max()).flatten() for a, b in zip(actual, expected, strict=True)]
    return float(torch.cat(differ).float().mean())


def _outputs(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
