"""What a network costs: multiply-accumulates in float and in binary, parameters and bytes."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from mmbivit.checks import UserError, check_integers

from .size import layer_sizes
from .unchanged import unchanged

__all__ = ["Complexity", "LayerComplexity", "complexity"]

# torch's formulas count two operations per multiply-accumulate; it has none for products with one vector.
_FORMULAS = {
    **flop_registry,
    torch.ops.aten.mv: lambda matrix, *args, **kwargs: 2 * matrix.numel(),
    torch.ops.aten.addmv: lambda bias, matrix, *args, **kwargs: 2 * matrix.numel(),
    torch.ops.aten.dot: lambda vector, *args, **kwargs: 2 * vector.numel(),
}
_FLOAT = (32, 32)


@dataclass(frozen=True)
class LayerComplexity:
    """Cost of what one module computes and holds itself, without the modules inside it.

    Args:
        name: name in the network; empty for the network itself.
        type: name of its class.
        bits: bits of the two sides of its products, each pair once; empty where it computes none.
        calls: how often it ran.
        output_shape: shape of the (first) tensor that it returned at its first call; empty if it did not run.
        flops: multiply-accumulates of its products with a float side.
        bops: multiply-accumulates of its products of two 1-bit sides.
        params: learnable parameters.
        size_bytes: bytes as they would be packed; see :func:`mmbivit.analysis.layer_sizes`.
    """

    name: str
    type: str
    bits: tuple[tuple[int, int], ...]
    calls: int
    output_shape: tuple[int, ...]
    flops: int
    bops: int
    params: int
    size_bytes: int

    @property
    def ops(self) -> float:
        """``BOPs / 64 + FLOPs``."""
        return self.bops / 64 + self.flops


@dataclass(frozen=True)
class Complexity:
    """Cost of a network for one input.

    Args:
        rows: of each module that computes products or holds something, in the order of the network.
        input_shape: shape of the input without the batch, such as channels, height and width.
        assumption: what a detector's count supposes, such as the number of regions; empty for other networks.
    """

    rows: tuple[LayerComplexity, ...]
    input_shape: tuple[int, ...]
    assumption: str = ""

    @property
    def flops(self) -> int:
        """Multiply-accumulates of products with a float side."""
        return sum(row.flops for row in self.rows)

    @property
    def bops(self) -> int:
        """Multiply-accumulates of products of two 1-bit sides."""
        return sum(row.bops for row in self.rows)

    @property
    def ops(self) -> float:
        """``BOPs / 64 + FLOPs``, the papers' measure of both (BinaryViT, Table 4)."""
        return self.bops / 64 + self.flops

    @property
    def params(self) -> int:
        """Learnable parameters."""
        return sum(row.params for row in self.rows)

    @property
    def size_bytes(self) -> int:
        """Bytes as they would be packed."""
        return sum(row.size_bytes for row in self.rows)

    def part(self, name: str) -> "Complexity":
        """Return the cost of a module inside, such as ``backbone``, and of all that is in it.

        Raises:
            ValueError: if the network has nothing of this name that costs anything.
        """
        rows = tuple(row for row in self.rows if f"{row.name}.".startswith(f"{name}."))
        if not rows:
            raise UserError(f"the network has no module {name!r} that computes or holds anything")
        return Complexity(rows, self.input_shape, self.assumption)


def complexity(module: nn.Module, input_shape: tuple[int, ...]) -> Complexity:
    """Count the multiply-accumulates of one input, and parameters and bytes.

    The module runs once, in evaluation mode, on zeros, and is left as it was. Counted are matrix products, convolutions
    and attention, nothing else: no norms, additions or activation functions, as in the papers. They belong to the
    innermost module that computes them. A module that multiplies other than floats says so by its attribute
    ``product_bits``: for each product of a call, in their order, the bits of its left and right side. Two 1-bit sides
    make BOPs, anything else FLOPs. A network in training stage 1 therefore counts as float where it is float then.

    A detector of MMDetection is counted as at inference. In a two-stage one the region proposal network leaves
    ``test_cfg.rpn.max_per_img`` regions and the box head ``test_cfg.rcnn.max_per_img`` detections, the most that the
    config allows; ``Complexity.assumption`` says how many.

    Args:
        module: backbone, classifier or detector, ours or of MMDetection or timm, or any module of one tensor.
        input_shape: shape of the input without the batch, such as ``(3, height, width)``.

    Raises:
        ValueError: if the module cannot run on such an input, if it is packed, or if a module computes another number
            of products than its ``product_bits`` says.
    """
    check_integers("input_shape", input_shape, 1, 2**24)
    input_shape = tuple(input_shape)
    sizes = layer_sizes(module)
    tallies = {name: _Tally() for name in sizes}
    example = next((parameter for parameter in module.parameters() if parameter.is_floating_point()), torch.empty(0))
    images = torch.zeros(1, *input_shape, dtype=example.dtype, device=example.device)
    try:
        with unchanged(module, training=False), _counted(module, tallies), torch.no_grad():
            assumption = _run(module, images)
    except _NotCountable:
        raise
    except Exception as error:  # whatever modules raise when shapes do not fit
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        shape = " x ".join(map(str, images.shape))
        raise UserError(f"{type(module).__name__} does not run on an input of {shape}: {reason}") from error
    rows = (
        LayerComplexity(
            name,
            type(layer).__name__,
            tuple(dict.fromkeys(tallies[name].bits)),
            tallies[name].calls,
            tallies[name].output_shape,
            tallies[name].flops,
            tallies[name].bops,
            sizes[name].params,
            sizes[name].packed_bytes,
        )
        for name, layer in module.named_modules()
    )
    return Complexity(tuple(row for row in rows if row.bits or row.size_bytes), input_shape, assumption)


class _NotCountable(UserError):
    """A network whose operations cannot be counted; the message says why."""


@dataclass
class _Tally:
    """What a module has computed so far."""

    bits: list[tuple[int, int]] = field(default_factory=list)
    calls: int = 0
    output_shape: tuple[int, ...] = ()
    flops: int = 0
    bops: int = 0


class _ProductCounter(TorchDispatchMode):
    """Notes the multiply-accumulates of each product, for the innermost module that runs."""

    def __init__(self, tallies: dict[str, _Tally]):
        super().__init__()
        self.tallies = tallies
        self.running: list[list[int]] = []  # of each module that runs now, the products of this call

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "mmbivit" and "nms" not in func.name():  # that has no products
            raise _NotCountable(
                "a packed network computes outside PyTorch and cannot be counted; count the one that it is made from"
            )
        formula = _FORMULAS.get(func.overloadpacket)
        if formula is None:
            with self:  # what is made of other operations shows them now
                result = func.decompose(*args, **kwargs)
            return func(*args, **kwargs) if result is NotImplemented else result
        result = func(*args, **kwargs)
        self.running[-1].append(formula(*args, **kwargs, out_val=result) // 2)
        return result

    def enter(self, module: nn.Module, args: tuple) -> None:
        """Be told, as a hook, that a module starts."""
        self.running.append([])

    def leave(self, name: str, module: nn.Module, args: tuple, output: Any) -> None:
        """Be told, as a hook, that the module ``name`` has returned."""
        products = self.running.pop()
        bits = getattr(module, "product_bits", (_FLOAT,) * len(products))
        if len(bits) != len(products):
            raise _NotCountable(
                f"{name or 'the network'} ({type(module).__name__}) computes {len(products)} product(s), but its "
                f"product_bits has the bits of {len(bits)}"
            )
        tally = self.tallies[name]
        tally.bits += bits
        tally.bops += sum(macs for macs, pair in zip(products, bits, strict=True) if tuple(pair) == (1, 1))
        tally.flops += sum(macs for macs, pair in zip(products, bits, strict=True) if tuple(pair) != (1, 1))
        tally.output_shape = tally.output_shape if tally.calls else _first_shape(output)
        tally.calls += 1


def _first_shape(output: Any) -> tuple[int, ...]:
    if isinstance(output, Tensor):
        return tuple(output.shape)
    if isinstance(output, dict):
        output = list(output.values())
    return _first_shape(output[0]) if isinstance(output, (list, tuple)) and output else ()


@contextmanager
def _counted(module: nn.Module, tallies: dict[str, _Tally]) -> Iterator[None]:
    """Count what a module computes, with attention as its two products."""
    counter = _ProductCounter(tallies)
    handles = []
    fast_attention = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)  # one operation that no formula is known for
        for name, layer in module.named_modules():
            handles.append(layer.register_forward_pre_hook(counter.enter))
            handles.append(layer.register_forward_hook(partial(counter.leave, name)))
        with sdpa_kernel(SDPBackend.MATH), counter:
            yield
    finally:
        for handle in handles:
            handle.remove()
        torch.backends.mha.set_fastpath_enabled(fast_attention)


def _run(module: nn.Module, images: Tensor) -> str:
    """Run a network on a batch; returns what the count supposes."""
    if "data_samples" not in inspect.signature(module.forward).parameters:
        module(images)
        return ""
    from mmdet.structures import DetDataSample  # only here: it takes seconds, and other networks do not need it

    size = tuple(images.shape[-2:])
    sizes = dict.fromkeys(("img_shape", "ori_shape", "pad_shape", "batch_input_shape"), size)
    samples = [DetDataSample(metainfo=dict(img_id=0, img_path="", scale_factor=(1.0, 1.0), **sizes))]
    if not hasattr(module, "roi_head"):
        module(images, samples, mode="tensor")
        return ""
    if not module.test_cfg.get("rpn"):  # learned queries, always as many
        module(images, samples, mode="predict")
        return ""
    regions, detections = module.test_cfg["rpn"]["max_per_img"], module.test_cfg["rcnn"]["max_per_img"]
    with ExitStack() as stack:
        stack.enter_context(_returning(module.rpn_head, "predict", partial(_boxes, images, regions)))
        stack.enter_context(_returning(module.roi_head, "predict_bbox", partial(_boxes, images, detections)))
        module(images, samples, mode="predict")
    masks = f" and the masks of {detections} detections" if module.roi_head.with_mask else ""
    return f"for {regions} regions{masks}"


@contextmanager
def _returning(module: nn.Module, method: str, make: Callable[[], Any]) -> Iterator[None]:
    """Let a method compute what it does, but return something else."""
    original = getattr(module, method)

    def replaced(*args: Any, **kwargs: Any) -> Any:
        original(*args, **kwargs)
        return make()

    setattr(module, method, replaced)
    try:
        yield
    finally:
        delattr(module, method)


def _boxes(images: Tensor, count: int) -> list:
    """Return ``count`` equal boxes at the corner of the image, as predictions of MMDetection for a batch of one."""
    from mmengine.structures import InstanceData

    corners = images.new_tensor([0, 0, min(16, images.shape[-1]), min(16, images.shape[-2])])
    labels = torch.zeros(count, dtype=torch.long, device=images.device)
    return [InstanceData(bboxes=corners.repeat(count, 1), scores=images.new_ones(count), labels=labels)]
