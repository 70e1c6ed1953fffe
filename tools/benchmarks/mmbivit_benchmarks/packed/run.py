"""The whole benchmark of packed inference."""

import math
import os
import platform
import re
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from mmbivit.checks import check_integer

from .kernels import breakdown, measure_gemm
from .memory import measure_memory
from .networks import make_networks
from .runtimes import RUNTIMES, Network
from .timing import Say, Shape, measure_size, size_name

__all__ = ["DETECTION", "describe_machine", "run_benchmark"]

DETECTION = (1, 800, 1344)
GEMM_SHAPE = (1, 224, 224)
MIN_ROUNDS = 5
WARM_UP_ARCH = dict(embed_dims=16, depths=(1, 1), num_heads=(1, 2))


def run_benchmark(
    shapes: Sequence[Shape],
    runtimes: Sequence[str],
    repeats: int,
    threads: int,
    memory_shape: Shape | None = None,
    network: str = "swin_t",
    arch: dict | None = None,
    left_out: dict[str, str] | None = None,
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """Measure everything.

    Args:
        shapes: batch, height and width of the images.
        runtimes: keys of :data:`RUNTIMES`.
        repeats: visits to each runtime for a single image of 224 x 224, see :func:`interleave`; more pixels get fewer.
        threads: of every runtime.
        memory_shape: of these ``shapes`` the one whose memory is measured; ``None`` for none.
        network: of :data:`.networks.NETWORKS`.
        arch: another one than its own.
        left_out: runtimes that are not measured, and why.
        say: told what is going on.

    Returns:
        Plain JSON values: ``network``, ``machine``, ``sizes`` (of :func:`measure_size`, by ``"1 x 224 x 224"``),
        ``breakdown`` by the same, ``gemm`` (of :func:`measure_gemm`), ``memory`` (of :func:`measure_memory`) and
        ``memory_size``.

    Raises:
        ValueError: if a runtime or a number has no sense.
    """
    check_options(shapes, runtimes, repeats, threads)
    sides = {side for shape in shapes for side in shape[1:]}
    if network == "deit_s" and len(sides) > 1:
        raise ValueError(f"sizes of {sorted(sides)} pixels; allowed: one, as token mixing of DeiT-S is of one size")
    networks = make_networks(network, arch, min(sides) if network == "deit_s" else 112)
    results: dict[str, Any] = dict(
        network=network, machine=describe_machine(threads), sizes={}, breakdown={}, memory={}, memory_size=None
    )
    for shape in shapes:
        name = size_name(shape)
        rounds = max(min(repeats, MIN_ROUNDS), round(repeats / math.sqrt(math.prod(shape) / 224**2)))
        with tempfile.TemporaryDirectory() as folder:
            rows = measure_size(networks, shape, runtimes, rounds, threads, Path(folder), say)
            for key, why in (left_out or {}).items():
                rows[key] = dict(title=RUNTIMES[key].title, kind=RUNTIMES[key].kind, problem=why)
            results["sizes"][name] = rows
            if "packed" in runtimes:
                results["breakdown"][name] = breakdown(networks[True], shape, rounds, threads)
            if shape == memory_shape:
                results["memory_size"] = name
                results["memory"] = measure_all_memory(networks, shape, runtimes, threads, Path(folder), say)
    say("matrix products")
    gemm_shape = GEMM_SHAPE if network == "swin_t" else (1, *shapes[0][1:])
    results["gemm"] = measure_gemm(networks[True], gemm_shape, max(1, repeats // 2), threads)
    return results


def check_options(shapes: Sequence[Shape], runtimes: Sequence[str], repeats: int, threads: int) -> None:
    """Raise ``ValueError`` for what makes no sense."""
    unknown = [name for name in runtimes if name not in RUNTIMES]
    if unknown:
        raise ValueError(f"unknown runtimes {', '.join(unknown)}; allowed: {', '.join(RUNTIMES)}")
    check_integer("repeats", repeats, 1)
    check_integer("threads", threads, 1)
    for shape in shapes:
        if len(shape) != 3 or shape[0] < 1 or min(shape[1:]) < 32:
            raise ValueError(f"size {size_name(shape)}; expected batch x height x width, 32 pixels or more")


def measure_all_memory(
    networks: dict[bool, Network], shape: Shape, runtimes: Sequence[str], threads: int, folder: Path, say: Say
) -> dict[str, dict]:
    """Measure the memory of runtimes one after the other; see :func:`measure_memory`."""
    warm_up = make_networks(arch=WARM_UP_ARCH)
    rows = {}
    for name in runtimes:
        runtime = RUNTIMES[name]
        say(f"{size_name(shape)}: memory of {runtime.title}")
        if name == "compile":
            rows[name] = dict(problem="not measured: its compiler stays in the process")
        else:
            cases = [(warm_up[runtime.binary], (1, 56, 56), folder / "warm_up")]
            cases.append((networks[runtime.binary], shape, folder))
            rows[name] = measure_memory(runtime, cases, threads)
        rows[name]["title"] = runtime.title
    return rows


def describe_machine(threads: int) -> dict[str, str]:
    """Name what the numbers depend on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts = dict(
        CPU=_cpu_model(), cores=str(cores), threads=str(threads), instructions=torch.backends.cpu.get_cpu_capability()
    )
    for package in ("torch", "onnxruntime", "openvino"):
        with suppress(PackageNotFoundError):
            facts[package] = version(package)
    with suppress(ImportError):
        from mmbivit.packed import kernels

        facts["packed kernels"] = f"{kernels.active_path()} of {', '.join(kernels.available_paths())}"
    return facts


def _cpu_model() -> str:
    with suppress(OSError):
        if found := re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return found[1]
    return platform.processor() or platform.machine()
