"""Tables of what the benchmark measured, and whether that is what packed inference must reach."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import ASCII2
from rich.console import Group
from rich.table import Table

from .networks import NETWORKS
from .timing import geometric_mean

__all__ = ["GOALS", "Goal", "fastest_float", "machine_table", "make_report", "make_table", "verdict", "verdict_table"]

Results = dict[str, Any]
MB = 1e6
SMALL, LARGE = "1 x 224 x 224", "1 x 800 x 1344"


@dataclass(frozen=True)
class Goal:
    """What packed inference must and should reach.

    Args:
        text: what is compared.
        must: the least.
        aim: what would be good.
        unit: of the numbers.
        reached: takes results, returns the number, or ``None`` where it was not measured.
        remark: takes results, returns what else there is to know about the number.
        more: more is better.
    """

    text: str
    must: float
    aim: float
    unit: str
    reached: Callable[[Results], float | None]
    remark: Callable[[Results], str] = lambda results: ""
    more: bool = True

    def verdict(self, value: float | None) -> str:
        """Say what a number reaches: ``aim``, ``must``, ``missed`` or ``not measured``."""
        if value is None:
            return "not measured"
        for name, bound in (("aim", self.aim), ("must", self.must)):
            if value >= bound if self.more else value <= bound:
                return name
        return "missed"


def median(row: dict) -> float | None:
    """Return the median of a runtime's times, ``None`` if it has none."""
    return statistics.median(row["ms"]) if row.get("ms") else None


def fastest_float(rows: dict[str, dict], kinds: Sequence[str] = ("float32",)) -> str | None:
    """Return the key of the fastest runtime that computes with one of ``kinds`` of numbers."""
    times = {name: median(row) for name, row in rows.items() if row["kind"] in kinds and row.get("ms")}
    return min(times, key=times.get) if times else None


def speedup(results: Results, size: str, kinds: Sequence[str] = ("float32",)) -> float | None:
    """Return how many times faster packed is than the fastest runtime of some kinds."""
    rows = results["sizes"].get(size, {})
    fastest, packed = fastest_float(rows, kinds), median(rows.get("packed", {}))
    return median(rows[fastest]) / packed if fastest and packed else None


def _speed_remark(size: str) -> Callable[[Results], str]:
    def remark(results: Results) -> str:
        rows = results["sizes"].get(size, {})
        fastest, value = fastest_float(rows), speedup(results, size, ("bfloat16",))
        text = f"{rows[fastest]['title']}; " if fastest else ""
        return f"{text}bfloat16: {value:.2f}x" if value else text.removesuffix("; ")

    return remark


def _gemm(results: Results) -> float | None:
    rows = results["gemm"]
    if not isinstance(rows, list):
        return None
    return geometric_mean([row["float_ms"] / row["packed_ms"] for row in rows if not _is_si(row)])


def _is_si(row: dict) -> bool:
    """Whether a product is one over the tokens of a window: none of Swin's own."""
    return " si." in row["layer"]


def _file(results: Results) -> float | None:
    sizes = [rows["packed"]["bytes"] / MB for rows in results["sizes"].values() if "bytes" in rows.get("packed", {})]
    return sizes[0] if sizes else None


def _memory_ratio(base: str) -> Callable[[Results], float | None]:
    def ratio(results: Results) -> float | None:
        rows = [results["memory"].get(name, {}) for name in ("packed", "torch")]
        if results["memory_size"] != LARGE or any("peak" not in row for row in rows):
            return None
        packed, floats = (row["peak"] - row[base] for row in rows)
        return packed / floats

    return ratio


def _memory_remark(results: Results) -> str:
    value = _memory_ratio("loaded")(results)
    return "" if value is None else f"without the network {value:.2f}x"


GOALS = (
    Goal("products with packing, geometric mean, against torch", 4, 6, "x", _gemm),
    Goal(
        "224 x 224, batch 1, against the fastest float32",
        2.28,
        5,
        "x",
        lambda r: speedup(r, SMALL),
        _speed_remark(SMALL),
    ),
    Goal(
        "800 x 1344, batch 1, against the fastest float32",
        2.5,
        5,
        "x",
        lambda r: speedup(r, LARGE),
        _speed_remark(LARGE),
    ),
    Goal("packed file", 4.2, 3.8, " MB", _file, more=False),
    Goal(
        "peak memory at 800 x 1344, against float torch",
        0.5,
        0.3,
        "x",
        _memory_ratio("before"),
        _memory_remark,
        more=False,
    ),
)


# Of networks other than Swin-T.
OTHER_GOALS = {
    "deit_s": (
        Goal(
            "224 x 224, batch 1, against the fastest float32",
            4,
            7,
            "x",
            lambda r: speedup(r, SMALL),
            _speed_remark(SMALL),
        ),
    ),
}


def make_report(results: Results) -> Group:
    """Make the tables that the tool prints, of what :func:`run_benchmark` returns."""
    parts: list[Table | str] = [machine_table(results["machine"])]
    parts += [
        _times(NETWORKS[results.get("network", "swin_t")][0], size, rows) for size, rows in results["sizes"].items()
    ]
    parts += [TIMES_NOTE, _files(results["sizes"])]
    if results["memory"]:
        parts += [_memory(results["memory_size"], results["memory"]), MEMORY_NOTE]
    parts.append(_products(results["gemm"]))
    parts += [_breakdown(size, phases) for size, phases in results["breakdown"].items()]
    parts += [BREAKDOWN_NOTE, verdict(results)]
    return Group(*parts)


TIMES_NOTE = (
    "vs packed: time over packed's. vs float: how many times faster than the fastest float32 runtime (bfloat16 is\n"
    "float, too, but another number format: it has a row, not that title). Outputs: largest difference from torch's\n"
    "over the largest value; of the binary network, the share of values that differ by more than 1e-4 of that from\n"
    "the simulated one in float64: float32 rounds, so a value that meets its threshold may get the other bit, and all\n"
    "that follows differs. The int8 networks are calibrated on random images: right for speed only.\n"
)
MEMORY_NOTE = (
    "Resident memory of a new process that only runs this, its libraries warmed up by a tiny network: the peak during\n"
    "the third inference, minus what was there before the network was loaded (images included: so this is network,\n"
    "activations and outputs), and minus what was there once it was loaded, before the first inference.\n"
)
BREAKDOWN_NOTE = "Time of a kernel's phase: summed over threads, divided by their number.\n"


def make_table(title: str, *columns: str, left: int = 1) -> Table:
    """Make a table with a title, whose columns are numbers but for the first ones."""
    table = Table(*columns, title=title, title_justify="left", title_style="bold", box=ASCII2)
    for i, column in enumerate(table.columns):
        column.justify = "left" if i < left else "right"
        column.no_wrap = i < len(columns) - 1
    table.columns[-1].overflow = "fold"
    return table


def machine_table(facts: dict[str, str]) -> Table:
    """Show what the numbers depend on."""
    table = make_table("Machine", "", "", left=2)
    table.show_header = False
    for key, value in facts.items():
        table.add_row(key, value)
    return table


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def _times(title: str, size: str, rows: dict[str, dict]) -> Table:
    names = ("runtime", "computes in", "ms, median", "25 % to 75 %", "vs packed", "vs float", "outputs")
    table = make_table(f"{title}, {size}", *names, left=2)
    table.columns[-1].justify = "left"
    packed, fastest = median(rows.get("packed", {})), fastest_float(rows)
    for row in rows.values():
        time = median(row)
        if time is None:
            table.add_row(row["title"], row["kind"], "", "", "", "", row["problem"])
            continue
        low, _, high = statistics.quantiles(row["ms"], n=4) if len(row["ms"]) > 1 else (time, time, time)
        table.add_row(
            row["title"],
            row["kind"],
            f"{time:.2f}",
            f"{low:.2f} to {high:.2f}",
            _ratio(packed and time / packed),
            _ratio(fastest and median(rows[fastest]) / time),
            f"{row['deviation']:.2%} differ" if row["kind"] == "1 bit" else f"{row['deviation']:.1e}",
        )
    return table


def _files(sizes: dict[str, dict]) -> Table:
    table = make_table("Files of the network", "runtime", "computes in", "MB", "of torch's", left=2)
    rows = next(iter(sizes.values()), {})
    floats = rows.get("torch", {}).get("bytes")
    for row in rows.values():
        if "bytes" in row:
            share = f"{row['bytes'] / floats:.3f}" if floats else ""
            table.add_row(row["title"], row["kind"], f"{row['bytes'] / MB:.2f}", share)
    return table


def _memory(size: str, rows: dict[str, dict]) -> Table:
    names = ("runtime", "network + inference, MB", "of torch's", "inference, MB", "of torch's", "")
    table = make_table(f"Peak memory, {size}", *names)
    table.columns[-1].justify = "left"
    for row in rows.values():
        if "problem" in row:
            table.add_row(row["title"], "", "", "", "", row["problem"])
            continue
        cells = []
        for base in ("before", "loaded"):
            value, floats = ((r["peak"] - r[base]) if "peak" in r else None for r in (row, rows.get("torch", {})))
            cells += [f"{value / MB:.1f}", _ratio(value / floats if floats else None)]
        table.add_row(row["title"], *cells)
    return table


def _products(rows: list[dict] | str) -> Table:
    names = ("layer (first of its shape)", "M", "K", "N", "torch float32, ms", "packed, ms", "ratio")
    table = make_table("Matrix products, 1 x 224 x 224: float32 in, signs and packing included, float32 out", *names)
    if isinstance(rows, str):
        table.add_row(rows)
        return table
    groups = {
        "geometric mean": [row for row in rows if not _is_si(row)],
        "geometric mean of spatial interaction": [row for row in rows if _is_si(row)],
    }
    for name, group in groups.items():
        ratios = [row["float_ms"] / row["packed_ms"] for row in group]
        for row, ratio in zip(group, ratios, strict=True):
            times = (f"{row[key]:.3f}" for key in ("float_ms", "packed_ms"))
            table.add_row(row["layer"], *(str(row[key]) for key in "mkn"), *times, _ratio(ratio))
        if ratios:
            table.add_row(name, "", "", "", "", "", _ratio(geometric_mean(ratios)), end_section=True)
    return table


def _breakdown(size: str, phases: dict[str, float] | str) -> Table:
    table = make_table(f"Where the packed time goes, {size}", "phase", "ms", "%")
    if isinstance(phases, str):
        table.add_row(phases)
        return table
    total = sum(phases.values())
    for name, ms in phases.items():
        table.add_row(name, f"{ms:.3f}", f"{100 * ms / total:.1f}")
    table.add_section()
    table.add_row("all", f"{total:.3f}", "100.0")
    return table


def verdict(results: Results) -> Table:
    """Compare with the goals of the network."""
    return verdict_table(OTHER_GOALS.get(results.get("network"), GOALS), results)


def verdict_table(goals: Sequence[Goal], results: Results, title: str = "What packed inference must reach") -> Table:
    """Compare what was measured with goals."""
    table = make_table(title, "goal", "must", "aim", "reached", "is", "")
    for column in table.columns[-2:]:
        column.justify = "left"
    for goal in goals:
        value = goal.reached(results)
        number = "" if value is None else f"{value:.2f}{goal.unit}"
        table.add_row(
            goal.text,
            f"{goal.must:g}{goal.unit}",
            f"{goal.aim:g}{goal.unit}",
            number,
            goal.verdict(value),
            goal.remark(results),
        )
    return table
