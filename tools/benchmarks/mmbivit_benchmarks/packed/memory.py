"""Measures the memory of a runtime, in a process of its own."""

import multiprocessing
import platform
import re
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

from .runtimes import Network, Runtime, reason
from .timing import Shape

__all__ = ["measure_memory", "peak_bytes", "reset_peak", "resident_bytes"]


def measure_memory(
    runtime: Runtime, cases: Sequence[tuple[Network, Shape, Path]], threads: int
) -> dict[str, int | str]:
    """Measure the memory of inference in a new process, which only loads a file and computes its features.

    Args:
        runtime: what computes.
        cases: networks, the batch, height and width of their images, and folders for their files. The last one is
            measured; those before only warm the libraries up (code and buffers that are there once, whatever the size
            of the network).
        threads: of the runtime.

    Returns:
        Bytes of resident memory: ``before`` the network is loaded, its images and all libraries included; when it is
        ``loaded``, before its first inference; and the ``peak`` during the third inference. Or ``problem``.
    """
    try:
        runtime.check()
        files = []
        for network, (batch, height, width), folder in cases:
            folder.mkdir(exist_ok=True)
            files.append(runtime.export(network, torch.zeros(batch, 3, height, width), folder))
        shapes = [shape for _, shape, _ in cases]
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(_measure_here, runtime, files, shapes, threads).result()
    except BrokenProcessPool:
        return dict(problem="its process was killed: out of memory?")
    except Exception as error:  # whatever a foreign library raises: the others are measured without it
        return dict(problem=reason(error))


def _measure_here(runtime: Runtime, files: Sequence[Path], shapes: Sequence[Shape], threads: int) -> dict[str, int]:
    for file, (batch, height, width) in zip(files, shapes, strict=True):
        images = torch.rand(batch, 3, height, width)
        before = resident_bytes()
        run = runtime.start(file, images, threads)
        loaded = resident_bytes()
        run()
        run()
        reset_peak()
        run()
        result = dict(before=before, loaded=loaded, peak=peak_bytes())
        del run
    return result


def resident_bytes() -> int:
    """Return the resident memory of this process; where /proc does not tell, its peak so far."""
    return _proc_status("VmRSS") or peak_bytes()


def reset_peak() -> None:
    """Let :func:`peak_bytes` start anew; without effect where the system cannot do that."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_bytes() -> int:
    """Return the peak of the resident memory since :func:`reset_peak`, or where that has no effect, since the start."""
    peak = _proc_status("VmHWM")
    if peak is not None:
        return peak
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


def _proc_status(key: str) -> int | None:
    try:
        found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None
