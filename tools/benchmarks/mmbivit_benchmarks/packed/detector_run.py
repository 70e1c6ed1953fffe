"""The benchmark of a whole detector: float in the fastest runtime of each part, packed backbone, and packed whole."""

import multiprocessing
import statistics
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from rich.console import Group
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmbivit import deploy

from .detectors import CONFIGS, PARTS, TENSOR_PARTS, Parts, detect, make_detectors
from .memory import peak_bytes, reset_peak, resident_bytes
from .report import Goal, machine_table, make_table, verdict_table
from .run import describe_machine
from .runtimes import (
    ONNX_NEEDS,
    OPENVINO_NEEDS,
    Runtime,
    export_module,
    reason,
    start_onnxruntime,
    start_openvino,
)
from .timing import FLOAT_TOLERANCE, Say, Shape, interleave, size_name, use_threads

__all__ = ["make_detector_report", "run_detector_benchmark"]

TITLES = dict(float="float, torch", float_heads="packed backbone", whole="packed whole")
# What a part of the float detector may run in, beside torch.
FLOAT_RUNTIMES = {
    "onnxruntime": Runtime("ONNX Runtime", "float32", export_module, start_onnxruntime, ONNX_NEEDS),
    "openvino": Runtime("OpenVINO", "float32", export_module, partial(start_openvino, "f32"), OPENVINO_NEEDS),
}
MB = 1e6


def run_detector_benchmark(
    shape: Shape, rounds: int, threads: int, changes: dict[str, Any] | None = None, say: Say = lambda text: None
) -> dict[str, Any]:
    """Measure Mask R-CNN Swin-T with random weights, part by part and whole.

    Args:
        shape: batch (1), height and width of the image.
        rounds: visits to each runtime of a part, see :func:`.timing.interleave`.
        threads: of every runtime.
        changes: of the configs, by dotted key.
        say: told what is going on.

    Returns:
        Plain JSON values: ``machine``, ``size``, ``found`` (proposals and detections of each detector), ``parts`` (by
        part and runtime the milliseconds of each call, or why there are none), ``whole`` (by detector), ``memory``
        (bytes by detector: ``before`` it is loaded, ``loaded``, and the ``peak``) and ``files`` (bytes by detector,
        and ``half`` of ``whole`` with what is float in 16 bits).
    """
    images = torch.randn(*shape[:1], 3, *shape[1:], generator=torch.Generator().manual_seed(1))
    say("building the detectors")
    with use_threads(threads), tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        detectors = make_detectors(images, changes)
        inferences = {name: Parts(model, images) for name, (_, model) in detectors.items()}
        for inference in inferences.values():
            inference.run()
        results: dict[str, Any] = dict(machine=describe_machine(threads), size=size_name(shape), parts={})
        results["found"] = {name: inference.found for name, inference in inferences.items()}
        for part, title in PARTS.items():
            say(f"measuring: {title}")
            runs = {name: inference.call(part) for name, inference in inferences.items()}
            others, problems = _float_runs(inferences["float"], part, threads, folder)
            times = interleave(runs | others, rounds)
            results["parts"][part] = {key: dict(ms=ms) for key, ms in times.items()} | problems
        say("measuring whole detectors")
        runs = {name: partial(detect, model, images) for name, (_, model) in detectors.items()}
        results["whole"] = {name: dict(ms=ms) for name, ms in interleave(runs, rounds).items()}
        files = {name: _write(name, cfg, model, folder) for name, (cfg, model) in detectors.items()}
        deploy.save(detectors["whole"][1], half := folder / "half.safetensors", detectors["whole"][0], half=True)
        results["files"] = {name: file.stat().st_size for name, file in (files | dict(half=half)).items()}
        say("measuring memory")
        results["memory"] = {name: _memory(name, file, shape, threads) for name, file in files.items()}
    return results


def _float_runs(
    inference: Parts, part: str, threads: int, folder: Path
) -> tuple[dict[str, Callable[[], Any]], dict[str, dict[str, str]]]:
    """Return what computes a part of the float detector in other runtimes, and why there is none."""
    if part not in TENSOR_PARTS:
        return {}, {}
    module, inputs = inference.tensors(part)
    inputs = [x.contiguous() for x in inputs]
    with torch.inference_mode():
        outputs = module(*inputs)
    expected = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    runs, problems, file = {}, {}, folder / f"{part}.onnx"
    for key, runtime in FLOAT_RUNTIMES.items():
        try:
            runtime.check()
            if not file.exists():
                runtime.export(module, inputs, file)
            run = runtime.start(file, inputs, threads)
            for ours, theirs in zip(run(), expected, strict=True):
                difference = float((ours - theirs).abs().max() / theirs.abs().max())
                if not difference < FLOAT_TOLERANCE:
                    raise ValueError(f"its outputs differ from torch's by {difference:.1e} of the largest value")
            runs[key] = run
        except Exception as error:  # whatever a foreign library raises: the others are measured without it
            problems[key] = dict(problem=reason(error))
    return runs, problems


def _write(name: str, cfg: Config, model: nn.Module, folder: Path) -> Path:
    """Write a detector as its users have it: float weights and a config, or a packed file."""
    file = folder / f"{name}.safetensors"
    if name != "float":
        deploy.save(model, file, cfg)
        return file
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, file)
    cfg.dump(folder / "float.py")
    return file


def _load(name: str, file: Path) -> nn.Module:
    if name != "float":
        return deploy.load(file)
    cfg = Config.fromfile(file.with_suffix(".py"))
    with DefaultScope.overwrite_default_scope("mmdet"):
        model = MODELS.build(cfg.model)
    model.load_state_dict(load_file(file))
    return model.eval()


def _memory(name: str, file: Path, shape: Shape, threads: int) -> dict[str, int | str]:
    """Measure the memory of inference in a new process, which only loads a file and detects."""
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(_measure_here, name, file, shape, threads).result()
    except Exception as error:  # a process that was killed, for example
        return dict(problem=reason(error))


def _measure_here(name: str, file: Path, shape: Shape, threads: int) -> dict[str, int]:
    torch.set_num_threads(threads)
    images = torch.randn(*shape[:1], 3, *shape[1:], generator=torch.Generator().manual_seed(1))
    detect(_load(name, file), images[..., :64, :64])  # for the code of the libraries
    before = resident_bytes()
    model = _load(name, file)
    loaded = resident_bytes()
    detect(model, images)
    reset_peak()
    detect(model, images)
    return dict(before=before, loaded=loaded, peak=peak_bytes())


# ---------------------------------------------------------------------------------------------------------------
# Tables


def _median(row: dict[str, Any]) -> float | None:
    return statistics.median(row["ms"]) if row.get("ms") else None


def fastest(rows: dict[str, dict[str, Any]]) -> tuple[str, float]:
    """Return which float runtime is the fastest of a part, and its milliseconds."""
    times = {name: _median(row) for name, row in rows.items() if name not in CONFIGS and row.get("ms")}
    name = min(times, key=times.get)
    return name, times[name]


def _sum(results: dict[str, Any]) -> float:
    return sum(fastest(rows)[1] for rows in results["parts"].values())


def _speedup(name: str) -> Callable[[dict[str, Any]], float]:
    return lambda results: _sum(results) / _median(results["whole"][name])


def _memory_ratio(results: dict[str, Any]) -> float | None:
    rows = [results["memory"][name] for name in ("whole", "float")]
    if any("problem" in row for row in rows):
        return None
    whole, floats = (row["peak"] - row["before"] for row in rows)
    return whole / floats


GOALS = (
    Goal("whole detector, all parts binary, against the fastest float", 3.5, 6, "x", _speedup("whole")),
    Goal("the same with float neck and heads", 1.5, 2, "x", _speedup("float_heads")),
    Goal("its file, all parts binary", 14, 9, " MB", lambda r: r["files"]["whole"] / MB, more=False),
    Goal("the same, what is float in 16 bits", 14, 9, " MB", lambda r: r["files"]["half"] / MB, more=False),
    Goal("peak memory, against float torch", 0.4, 0.2, "x", _memory_ratio, more=False),
)


def make_detector_report(results: dict[str, Any]) -> Group:
    """Make the tables that the tool prints, of what :func:`run_detector_benchmark` returns."""
    names = {name: runtime.title for name, runtime in FLOAT_RUNTIMES.items()}
    columns = ("ms, median", TITLES["float"], *names.values(), "fastest float", *(TITLES[name] for name in CONFIGS))
    parts = make_table(f"Mask R-CNN Swin-T, {results['size']}", *columns)
    for part, rows in results["parts"].items():
        cells = [_cell(_median(rows.get(name, {}))) for name in ("float", *names)]
        parts.add_row(PARTS[part], *cells, _cell(fastest(rows)[1]), *(_cell(_median(rows[name])) for name in CONFIGS))
    parts.add_section()
    total = {name: sum(_median(rows[name]) for rows in results["parts"].values()) for name in ("float", *CONFIGS)}
    blank = [""] * len(names)
    parts.add_row("sum", _cell(total["float"]), *blank, _cell(_sum(results)), *(_cell(total[name]) for name in CONFIGS))
    whole = {name: _median(row) for name, row in results["whole"].items()}
    parts.add_row("whole, measured", _cell(whole["float"]), *blank, "", *(_cell(whole[name]) for name in CONFIGS))
    ratios = (f"{_sum(results) / whole[name]:.2f}x" for name in CONFIGS)
    parts.add_row("faster than the fastest float", f"{_sum(results) / whole['float']:.2f}x", *blank, "", *ratios)
    sizes = make_table("Files and peak memory", "", "file, MB", "model + inference, MB", "of float's")
    floats = results["memory"]["float"]
    for name, title in TITLES.items():
        row = results["memory"][name]
        size = f"{results['files'][name] / MB:.2f}"
        if "problem" in row or "problem" in floats:
            sizes.add_row(title, size, row.get("problem", ""), "")
            continue
        used, of = row["peak"] - row["before"], floats["peak"] - floats["before"]
        sizes.add_row(title, size, f"{used / MB:.0f}", f"{used / of:.2f}x")
    sizes.add_row("packed whole, --half", f"{results['files']['half'] / MB:.2f}", "", "")
    found = "; ".join(
        f"{TITLES[name]} {one} proposals, {two} detections" for name, (one, two) in results["found"].items()
    )
    problems = [
        f"{PARTS[part]}, {names[name]}: {row['problem']}"
        for part, rows in results["parts"].items()
        for name, row in rows.items()
        if "problem" in row
    ]
    return Group(
        machine_table(results["machine"]), parts, f"Random weights: {found}.", *problems, "", sizes,
        verdict_table(GOALS, results),
    )  # fmt: skip


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
