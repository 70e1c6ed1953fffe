"""Times runtimes in turn, after a check of what they compute."""

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from .runtimes import RUNTIMES, Network, Run, Runtime, Unavailable, reason

__all__ = ["Say", "Shape", "geometric_mean", "interleave", "measure_size", "size_name", "use_threads"]

Shape = tuple[int, int, int]
Say = Callable[[str], None]
FLOAT_TOLERANCE = 1e-3  # of the largest value: float32 runtimes reorder sums, and nothing else
PACKED_TOLERANCE = 1e-4


@contextmanager
def use_threads(threads: int) -> Iterator[None]:
    """Let torch, and with it our kernels, use that many threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def interleave(runs: dict[str, Run], rounds: int, seconds: float = 0.1, pause: float = 0.05) -> dict[str, list[float]]:
    """Time functions in turn, so that what slows the machine down for a while hits all of them.

    Each visit waits until the idle threads of the last runtime have stopped spinning, calls the function once without
    counting, then counts calls for some time, one at least.

    Args:
        runs: functions by name.
        rounds: visits to each.
        seconds: time of counted calls in a visit.
        pause: seconds to wait before a visit.

    Returns:
        Milliseconds of every counted call.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            time.sleep(pause)
            run()
            end = time.perf_counter() + seconds
            while True:
                start = time.perf_counter()
                run()
                stop = time.perf_counter()
                times[name].append(1000 * (stop - start))
                if stop > end:
                    break
    return times


def size_name(shape: Shape) -> str:
    """Return batch, height and width as tables and files name them."""
    return " x ".join(map(str, shape))


def measure_size(
    networks: dict[bool, Network],
    shape: Shape,
    runtimes: Sequence[str],
    rounds: int,
    threads: int,
    folder: Path,
    say: Say = lambda text: None,
) -> dict[str, dict]:
    """Check and time runtimes on images of one shape.

    Args:
        networks: of :func:`make_networks`.
        shape: batch, height and width.
        runtimes: keys of :data:`RUNTIMES`.
        rounds: visits to each runtime, see :func:`interleave`.
        threads: of each runtime.
        folder: the networks are written here.
        say: told what is going on.

    Returns:
        For each runtime ``title``, ``kind``, and either ``problem`` (why there is no time), or ``ms`` (of every call),
        ``deviation`` and ``bytes`` of its file. The deviation is the largest difference from torch's outputs relative
        to their largest value; for the binary network the share of values that differ by more than ``1e-4`` of that
        from the simulated network in float64.
    """
    images = torch.randn(shape[0], 3, *shape[1:], generator=torch.Generator().manual_seed(1))
    with torch.inference_mode(), use_threads(threads):
        expected = {False: networks[False].model(images)}
        # In float32 even the simulated network differs from itself: it sums in some order, and bits flip at ties.
        expected[True] = copy.deepcopy(networks[True].model).double()(images.double())
    rows, runs = {}, {}
    for name in runtimes:
        runtime = RUNTIMES[name]
        say(f"{size_name(shape)}: preparing {runtime.title}")
        rows[name] = row = dict(title=runtime.title, kind=runtime.kind)
        try:
            runtime.check()
            file = runtime.export(networks[runtime.binary], images, folder)
            run = runtime.start(file, images, threads)
            row["deviation"] = _check(runtime, run(), expected[runtime.binary])
        except Exception as error:  # whatever a foreign library raises: the others are measured without it
            row["problem"] = reason(error)
            continue
        row["bytes"] = file.stat().st_size
        runs[name] = run
    say(f"{size_name(shape)}: measuring {len(runs)} runtimes, {rounds} rounds")
    with use_threads(threads):
        for name, times in interleave(runs, rounds).items():
            rows[name]["ms"] = times
    return rows


def _check(runtime: Runtime, outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    if [output.shape for output in outputs] != [tensor.shape for tensor in expected]:
        raise Unavailable(f"its outputs have the shapes {[tuple(output.shape) for output in outputs]}")
    relative = [(a - b).abs() / b.abs().max() for a, b in zip(outputs, expected, strict=True)]
    if runtime.kind == "1 bit":
        differing = sum(int((values > PACKED_TOLERANCE).sum()) for values in relative)
        return differing / sum(values.numel() for values in relative)
    deviation = max(float(values.max()) for values in relative)
    if runtime.kind == "float32" and not deviation < FLOAT_TOLERANCE:
        raise Unavailable(f"its outputs differ from torch's by {deviation:.1e} of the largest value: not timed")
    return deviation


def geometric_mean(values: Sequence[float]) -> float:
    """Return the geometric mean of positive numbers."""
    return math.exp(statistics.fmean(map(math.log, values)))
