"""What a training step costs, of a binary backbone and of mmdet's float one: time, kept bytes, peak memory."""

import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from mmengine.config import ConfigDict
from mmengine.registry import MODELS, DefaultScope
from rich.console import Group
from rich.table import Table
from torch import Tensor, nn

from mmbivit import get_config
from mmbivit.distill import Distiller
from mmbivit.engine.allocator import release_freed_memory
from mmbivit.engine.decoupled_training_hook import build_terms, find_staged_backbone
from mmbivit_benchmarks.evidence import set_value
from mmbivit_benchmarks.packed.memory import peak_bytes, reset_peak, resident_bytes
from mmbivit_benchmarks.packed.report import Goal, machine_table, make_table, verdict_table
from mmbivit_benchmarks.packed.run import describe_machine
from mmbivit_benchmarks.packed.runtimes import reason
from mmbivit_benchmarks.packed.timing import Say, Shape, size_name, use_threads

__all__ = [
    "PARTS",
    "VARIANTS",
    "Step",
    "kept_bytes",
    "make_shares_table",
    "make_step_report",
    "run_step_benchmark",
    "where_time_goes",
]

PARTS = dict(backbone="Swin-T backbone", detector="Mask R-CNN Swin-T")
CONFIG = "mask_rcnn_sibivit_swin_t"
OBJECTS = 20  # of each image


@dataclass(frozen=True)
class Variant:
    """What is trained.

    Args:
        title: its name in tables.
        stage: training stage of the binary backbone; ``None`` for mmdet's float one.
        teacher: whether a float teacher is distilled.
        keep_bits: see :class:`mmbivit.binary.Recipe`.
    """

    title: str
    stage: int | None = None
    teacher: bool = False
    keep_bits: bool = True


VARIANTS = {
    "float": Variant("float, mmdet"),
    "stage1": Variant("stage 1, no teacher", 1),
    "stage1_teacher": Variant("stage 1", 1, teacher=True),
    "stage2": Variant("stage 2", 2),
    "stage1_floats": Variant("stage 1, floats kept", 1, teacher=True, keep_bits=False),
    "stage2_floats": Variant("stage 2, floats kept", 2, keep_bits=False),
}
FLOAT_BACKBONE = dict(
    type="mmdet.SwinTransformer",
    embed_dims=96,
    depths=(2, 2, 6, 2),
    num_heads=(3, 6, 12, 24),
    window_size=7,
    mlp_ratio=4,
    drop_path_rate=0.1,
    patch_norm=True,
    out_indices=(0, 1, 2, 3),
    with_cp=False,
    convert_weights=False,
)


class _Alone(nn.Module):
    """A backbone whose loss is the mean square of its outputs, called as detectors are."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone

    def forward(self, inputs: Tensor, data_samples: Any = None, mode: str = "loss") -> dict[str, Tensor]:
        return dict(loss=sum(output.square().mean() for output in self.backbone(inputs)))


class Step:
    """A training step: forward, backward, AdamW.

    Args:
        part: one of :data:`PARTS`.
        variant: what is trained.
        shape: batch, height and width of the images.
        device: where.
        changes: of the detector's config, by dotted key; those of a float backbone have ``float_backbone.`` in front.
    """

    def __init__(
        self, part: str, variant: Variant, shape: Shape, device: str = "cpu", changes: dict[str, Any] | None = None
    ):
        cfg = get_config(CONFIG)
        cfg.float_backbone = ConfigDict(FLOAT_BACKBONE)
        for key, value in (changes or {}).items():
            set_value(cfg, key, value)
        if variant.stage is None:
            cfg.model.backbone = cfg.float_backbone
        else:
            cfg.model.backbone.update(recipe=dict(base="sibivit", keep_bits=variant.keep_bits))
        torch.manual_seed(0)
        model = _build(cfg.model) if part == "detector" else _Alone(_build(cfg.model.backbone))
        self.model = model.to(device).train()
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(shape[0], 3, *shape[1:], generator=generator).to(device)
        self.samples = [_sample(shape[1:], generator).to(device) for _ in range(shape[0] * (part == "detector"))]
        if variant.stage is not None:
            backbone = find_staged_backbone(model)
            backbone.set_stage(variant.stage)
            if variant.teacher:
                teacher = ConfigDict(cfg.model.backbone, recipe="float", spatial_interaction=None, mlp_ratio=4)
                Distiller(model, backbone, _build(teacher).to(device), build_terms(None, 1.0))
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)

    def loss(self) -> Tensor:
        """Return the sum of all losses."""
        losses = self.model(self.images, self.samples, mode="loss")
        parts = [part for loss in losses.values() for part in (loss if isinstance(loss, list) else [loss])]
        return sum(part for part in parts if part.requires_grad)

    def __call__(self) -> None:
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def _build(cfg: dict) -> nn.Module:
    with DefaultScope.overwrite_default_scope("mmdet"):
        return MODELS.build(cfg)


def _sample(size: tuple[int, int], generator: torch.Generator) -> Any:
    """Make an annotated image: boxes of all sizes with full masks."""
    import numpy as np
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    height, width = size
    corners = torch.rand(OBJECTS, 2, generator=generator)
    sides = (1 - corners) * torch.rand(OBJECTS, 2, generator=generator).clamp(min=0.1)
    boxes = torch.cat([corners, corners + sides], dim=1) * torch.tensor([width, height, width, height])
    masks = np.zeros((OBJECTS, height, width), np.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
        mask[top : bottom + 1, left : right + 1] = 1
    meta = dict(img_shape=size, ori_shape=size, pad_shape=size, batch_input_shape=size, scale_factor=(1.0, 1.0))
    labels = torch.randint(80, (OBJECTS,), generator=generator)
    found = InstanceData(bboxes=boxes, labels=labels, masks=BitmapMasks(masks, height, width))
    return DetDataSample(metainfo=meta, gt_instances=found, ignored_instances=InstanceData(bboxes=torch.zeros(0, 4)))


def kept_bytes(step: Step) -> int:
    """Return how many bytes a forward pass keeps for the backward pass; parameters are left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in step.model.parameters()}
    kept: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in own:
            kept[place] = tensor  # which stays alive, so that nothing else gets its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        step.loss()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def run_step_benchmark(
    part: str,
    shape: Shape,
    variants: Sequence[str],
    rounds: int,
    threads: int,
    device: str = "cpu",
    memory: bool = True,
    changes: dict[str, Any] | None = None,
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """Measure training steps of a backbone or detector with random weights, the variants in turn.

    Args:
        part: one of :data:`PARTS`.
        shape: batch, height and width of the images.
        variants: keys of :data:`VARIANTS`.
        rounds: steps of each that are timed.
        threads: on the CPU.
        device: where.
        memory: measure the peak too, each variant in a process of its own.
        changes: see :class:`Step`.
        say: told what is going on.

    Returns:
        Plain JSON values: ``machine``, ``part``, ``size``, and ``rows``, by variant ``ms`` of every step, ``kept``
        bytes, and where it was measured ``peak`` bytes (model, gradients, Adam's state and one step) and on CUDA the
        ``largest`` batch that fits.
    """
    machine = describe_machine(threads)
    if device != "cpu":
        machine["device"] = torch.cuda.get_device_name(device)
    rows: dict[str, dict[str, Any]] = {name: {} for name in variants}
    make = partial(Step, part, shape=shape, device=device, changes=changes)
    if memory:  # first, while this process is small
        for name in variants:
            say(f"{PARTS[part]}, {size_name(shape)}: memory of {VARIANTS[name].title}")
            rows[name].update(_memory(partial(make, VARIANTS[name]), shape, threads, device))
    with use_threads(threads):
        steps = {}
        for name in variants:
            say(f"{PARTS[part]}, {size_name(shape)}: {VARIANTS[name].title}")
            steps[name] = make(VARIANTS[name])
            rows[name]["kept"] = kept_bytes(steps[name])
            steps[name]()
        say(f"timing {rounds} rounds")
        for name, ms in _alternate(steps, rounds, device).items():
            rows[name]["ms"] = ms
    return dict(machine=machine, part=part, size=size_name(shape), rows=rows)


# What the profiler calls them; the rest has no name.
KINDS = {
    "float products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
    "native products": ("_Linear", "_LinearBackward"),
    "native attention": ("_AttentionStep", "_AttentionStepBackward"),
    "copies": ("aten::copy_", "aten::cat"),
    "BatchNorm": ("aten::native_batch_norm", "aten::native_batch_norm_backward"),
}


def where_time_goes(step: Step) -> dict[str, float]:
    """Return the shares of a step's time on the CPU, by :data:`KINDS`, and ``rest``."""
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        step()
    times = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
    total = sum(times.values())
    shares = {kind: sum(times.get(name, 0) for name in names) / total for kind, names in KINDS.items()}
    return shares | dict(rest=1 - sum(shares.values()))


def make_shares_table(part: str, shape: Shape, variants: Sequence[str], threads: int) -> Table:
    """Measure :func:`where_time_goes`, and make a table of it."""
    table = make_table(f"{PARTS[part]}, {size_name(shape)}: where the time of a step goes, %", "", *KINDS, "rest")
    with use_threads(threads):
        for name in variants:
            shares = where_time_goes(Step(part, VARIANTS[name], shape))
            table.add_row(VARIANTS[name].title, *(f"{100 * share:.0f}" for share in shares.values()))
    return table


def _alternate(steps: dict[str, Step], rounds: int, device: str) -> dict[str, list[float]]:
    """Return the milliseconds of each step; they take turns, and each round begins with another one."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    for i in range(rounds):
        for name in order[i % len(order) :] + order[: i % len(order)]:
            gc.collect()
            release_freed_memory()  # or what one step leaves, of another size, adds up to more than the machine has
            _wait(device)
            start = time.perf_counter()
            steps[name]()
            _wait(device)
            times[name].append(1000 * (time.perf_counter() - start))
    return times


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


def _memory(make: Callable[[], Step], shape: Shape, threads: int, device: str) -> dict[str, Any]:
    measure = _peak_on_cpu if device == "cpu" else _peak_on_cuda
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(measure, make, shape, threads).result()
    except Exception as error:  # a process that was killed, for example
        return dict(problem=reason(error))


def _peak_on_cpu(make: Callable[..., Step], shape: Shape, threads: int) -> dict[str, int]:
    torch.set_num_threads(threads)
    make(shape=(1, 64, 64))()  # for the code of the libraries
    gc.collect()
    before = resident_bytes()
    step = make()
    step()
    reset_peak()
    step()
    return dict(peak=peak_bytes() - before)


def _peak_on_cuda(make: Callable[..., Step], shape: Shape, threads: int) -> dict[str, int]:
    step = make()
    step()
    torch.cuda.reset_peak_memory_stats()
    step()
    peak = torch.cuda.max_memory_allocated()
    del step
    fits, too_many = shape[0], None
    while too_many is None or too_many - fits > 1:
        batch = 2 * fits if too_many is None else (fits + too_many) // 2
        gc.collect()
        torch.cuda.empty_cache()
        try:
            step = make(shape=(batch, *shape[1:]))
            step()
            step()
            fits = batch
        except torch.cuda.OutOfMemoryError:
            too_many = batch
        step = None
    return dict(peak=peak, largest=fits)


# ---------------------------------------------------------------------------------------------------------------
# Tables


def _ratio(key: str, name: str) -> Callable[[dict[str, Any]], float | None]:
    def ratio(results: dict[str, Any]) -> float | None:
        values = [_value(results["rows"].get(other, {}), key) for other in (name, "float")]
        return None if None in values else values[0] / values[1]

    return ratio


def _value(row: dict[str, Any], key: str) -> float | None:
    return statistics.median(row["ms"]) if key == "ms" and "ms" in row else row.get(key)


def _goal(text: str, must: float, aim: float, key: str, name: str) -> Goal:
    return Goal(text, must, aim, "x", _ratio(key, name), more=False)


# Against mmdet's float Swin-T without checkpointing.
GOALS = dict(
    backbone=(
        _goal("bytes kept, stage 2", 0.5, 0.25, "kept", "stage2"),
        _goal("bytes kept, stage 1, student", 0.8, 0.5, "kept", "stage1"),
        _goal("step time, stage 2", 1.1, 0.9, "ms", "stage2"),
        _goal("step time, stage 1, with teacher", 1.45, 1.3, "ms", "stage1_teacher"),
    ),
    detector=(_goal("step time, stage 2", 1.05, 0.95, "ms", "stage2"),),
)


def make_step_report(results: dict[str, Any]) -> Group:
    """Make the tables that the tool prints, of what :func:`run_step_benchmark` returns."""
    names = ("", "step, ms", "of float's", "kept, MB", "of float's", "peak, MB", "of float's", "largest batch")
    table = make_table(f"{PARTS[results['part']]}, {results['size']}", *names)
    for name, row in results["rows"].items():
        cells = []
        for key, scale in (("ms", 1), ("kept", 1e6), ("peak", 1e6)):
            value, ratio = _value(row, key), _ratio(key, name)(results)
            cells += ["" if value is None else f"{value / scale:.1f}", "" if ratio is None else f"{ratio:.2f}x"]
        table.add_row(VARIANTS[name].title, *cells, row.get("problem", str(row.get("largest", ""))))
    goals = verdict_table(GOALS[results["part"]], results, "What a training step must reach")
    return Group(machine_table(results["machine"]), table, NOTE, goals)


NOTE = (
    "Step: forward, backward, AdamW; the median, the variants in turn. Kept: what the forward pass keeps for the\n"
    "backward pass, each storage once, parameters left out. Peak: model, gradients, Adam's state and one step, in a\n"
    "process of its own (resident memory; on CUDA the allocator's). Stage 1 has a float teacher unless said.\n"
)
