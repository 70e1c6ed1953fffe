"""The complexity of a config's network, beside the same network in float, as tables."""

import copy
import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from rich.box import SIMPLE_HEAD
from rich.table import Table as TerminalTable
from rich.text import Text
from torch import nn

import mmbivit
from mmbivit.analysis import Complexity, complexity
from mmbivit.apis.binary_parts import set_binary_parts
from mmbivit.apis.config import is_classifier, load_config
from mmbivit.checks import UserError, check_integers
from mmbivit.datasets.wrappers import inner_dataset
from mmbivit.files import atomic_writer
from mmbivit.models import Backbone
from mmbivit.models.stage import staged_modules

from .page import Page, Section, Table, render

__all__ = [
    "FORMATS",
    "ConfigComplexity",
    "check_format",
    "complexity_table",
    "config_complexity",
    "default_shape",
    "layer_records",
    "quantity",
    "readable",
    "total_records",
    "write_complexity",
]

Record = dict[str, str | int | float]

EXPLANATION = (
    "FLOPs and BOPs: multiply-accumulates of matrix products, convolutions and attention, with a float side and of two "
    "1-bit sides; nothing else is counted. OPs = BOPs / 64 + FLOPs. Size: 1 bit a binary weight, 4 bytes a scale and "
    "any other parameter or buffer that inference needs."
)


@dataclass(frozen=True)
class ConfigComplexity:
    """Complexity of the network of a config.

    Args:
        config: the config file.
        kind: ``classifier`` or ``detector``.
        network: of the config's network, in training stage 2.
        as_float: of the same in float, as the teacher is: the backbone with recipe ``float`` and without its
            ``binary_options``, neck and heads those of MMDetection; ``None`` where the backbone is not ours, or float
            already.
    """

    config: str
    kind: str
    network: Complexity
    as_float: Complexity | None

    @property
    def caption(self) -> str:
        """For which input the numbers hold, and what they count."""
        shape = " x ".join(map(str, self.network.input_shape))
        assumption = f", {self.network.assumption}" if self.network.assumption else ""
        return f"For an input of {shape}{assumption}.\n{EXPLANATION}"


def config_complexity(config: str | Path, shape: Sequence[int] | None = None) -> ConfigComplexity:
    """Count the complexity of a config's network; no checkpoint and no data are needed.

    Args:
        config: the config file of a detector or classifier.
        shape: height and width of the image in pixels, as the network gets it; :func:`default_shape` by default.

    Raises:
        FileNotFoundError: if the config does not exist.
        ValueError: if its network does not run on images of this shape, or is packed.
    """
    if shape is not None:
        check_integers("--shape", shape, 1, 2**15)
    cfg = load_config(config)
    classifier = is_classifier(cfg)
    input_shape = (3, *(shape or default_shape(cfg)))
    with DefaultScope.overwrite_default_scope(cfg.get("default_scope") or ("mmengine" if classifier else "mmdet")):
        model = MODELS.build(copy.deepcopy(cfg.model))  # detectors change the configs of their heads
        network = complexity(model, input_shape)
        as_float = None
        backbone = getattr(model, "backbone", None)
        if isinstance(backbone, Backbone) and cfg.model.backbone.get("recipe") != "float":
            options = {key: cfg.model.backbone[key] for key in cfg.model.backbone.keys() - backbone.binary_options}
            options["recipe"] = "float"
            if len(staged_modules(model)) > 1:  # neck and heads, too
                set_binary_parts(cfg, ())
                cfg.model.backbone = options
                as_float = complexity(MODELS.build(copy.deepcopy(cfg.model)), input_shape)
            else:
                as_float = _with_backbone(network, MODELS.build(options))
    return ConfigComplexity(str(config), "classifier" if classifier else "detector", network, as_float)


def _with_backbone(network: Complexity, backbone: nn.Module) -> Complexity:
    """Exchange the backbone, since the rest costs the same, and running a detector takes a while."""
    rows = complexity(backbone, network.input_shape).rows
    rows = [replace(row, name=f"backbone.{row.name}".rstrip(".")) for row in rows]
    rows += [row for row in network.rows if not f"{row.name}.".startswith("backbone.")]
    return replace(network, rows=tuple(rows))


def default_shape(cfg: Config) -> tuple[int, int]:
    """Return height and width of the images that a config tests with, 224 x 224 where that is not clear.

    Where the aspect ratio is kept, it is the largest image, lying: ``Resize`` to ``(1333, 800)`` makes 800 x 1333, and
    with the padding of the data preprocessor 800 x 1344.
    """
    loader = cfg.get("test_dataloader") or cfg.get("val_dataloader")
    pipeline = inner_dataset(loader["dataset"]).get("pipeline") if loader else None
    shapes = [shape for step in pipeline or () if (shape := _output_shape(step))]
    height, width = shapes[0] if shapes else (224, 224)
    divisor = (cfg.model.get("data_preprocessor") or {}).get("pad_size_divisor") or 1
    return -(-height // divisor) * divisor, -(-width // divisor) * divisor


def _output_shape(step: dict[str, Any]) -> tuple[int, int] | None:
    """Return height and width after a transform that sets them."""
    if size := step.get("input_size"):
        return (size, size) if isinstance(size, int) else tuple(size)
    kind, scale = step.get("type"), step.get("scale")
    if not str(getattr(kind, "__name__", kind)).endswith("Resize") or not isinstance(scale, (list, tuple)):
        return None
    return (min(scale), max(scale)) if step.get("keep_ratio") else (scale[1], scale[0])


def total_records(report: ConfigComplexity) -> list[Record]:
    """Return one dict of exact numbers for each network: backbone and whole, as the config says and as float."""
    networks = {"": report.network, ", as float": report.as_float}
    records = []
    for part in ("backbone", report.kind):
        for suffix, network in networks.items():
            if network is not None and (part == report.kind or _has_backbone(network)):
                cost = network if part == report.kind else network.part(part)
                records.append({"network": part + suffix, **_costs(cost)})
    return records


def _has_backbone(network: Complexity) -> bool:
    return any(row.name.startswith("backbone.") for row in network.rows)


def layer_records(network: Complexity) -> list[Record]:
    """Return one dict of exact numbers for each module; they sum to the whole."""
    return [
        {
            "module": row.name or "(itself)",
            "type": row.type,
            "bits": ", ".join(f"{left} x {right}" for left, right in row.bits),
            "calls": row.calls,
            "output": " x ".join(map(str, row.output_shape)),
            **_costs(row),
        }
        for row in network.rows
    ]


def _costs(cost: Any) -> Record:
    ops = int(cost.ops) if cost.ops == int(cost.ops) else cost.ops
    return {"FLOPs": cost.flops, "BOPs": cost.bops, "OPs": ops, "parameters": cost.params, "bytes": cost.size_bytes}


def readable(records: Sequence[Record]) -> list[list[str]]:
    """Return the header and the rows of a table with four digits and a unit prefix for each large number."""
    header = [{"bytes": "size"}.get(key, key) for key in records[0]]
    return [header, *([_text(key, value) for key, value in record.items()] for record in records)]


def _text(key: str, value: str | int | float) -> str:
    if isinstance(value, str) or key == "calls":
        return str(value)
    return quantity(value, "B" if key == "bytes" else "")


def quantity(value: float, unit: str = "") -> str:
    """Write a number with four digits and a prefix of its unit, such as ``5.556 MB``."""
    power = next((power for power in (4, 3, 2, 1) if value >= 0.99995 * 1000**power), 0)  # as it rounds to 1000
    number = f"{value / 1000**power:#.4g}" if power else f"{value:.4g}"
    return f"{number} {('', 'k', 'M', 'G', 'T')[power]}{unit}".strip()


def complexity_table(records: Sequence[Record], title: str | None = None, caption: str | None = None) -> TerminalTable:
    """Make a table for the terminal of what :func:`total_records` or :func:`layer_records` returns."""
    table = TerminalTable(title=title and Text(title), caption=caption and Text(caption), caption_justify="left")
    table.box, table.pad_edge, table.collapse_padding = SIMPLE_HEAD, False, True  # names of modules are long
    header, *rows = readable(records)
    for i, (name, value) in enumerate(zip(header, records[0].values(), strict=True)):
        table.add_column(name, justify="left" if isinstance(value, str) else "right", no_wrap=i > 0, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def check_format(path: str | Path) -> None:
    """Raise a ValueError unless a file's name ends in ``.html``, ``.md`` or ``.csv``."""
    if Path(path).suffix.lower() not in FORMATS:
        raise UserError(f"{path}: a report is written as its name ends; allowed: {', '.join(FORMATS)}")


def write_complexity(report: ConfigComplexity, path: str | Path, per_layer: bool = False) -> None:
    """Write a report as a web page, Markdown or CSV, by the ending of the file's name; missing folders are made.

    Args:
        report: what :func:`config_complexity` returns.
        path: the file; it is replaced if it exists.
        per_layer: also write a row for each module; CSV, which has exact numbers, has these alone then.

    Raises:
        ValueError: for another ending.
        OSError: if the file cannot be written.
    """
    check_format(path)
    text = FORMATS[Path(path).suffix.lower()](report, per_layer)
    with atomic_writer(Path(path)) as file:
        file.write(text.encode())


def _csv(report: ConfigComplexity, per_layer: bool) -> str:
    records = layer_records(report.network) if per_layer else total_records(report)
    text = io.StringIO()
    writer = csv.DictWriter(text, records[0].keys())
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def _markdown(report: ConfigComplexity, per_layer: bool) -> str:
    lines = [f"# Complexity of {report.config}", ""]
    for records in _tables(report, per_layer):
        header, *rows = readable(records)
        rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
        align = ["---" if isinstance(value, str) else "---:" for value in records[0].values()]
        lines += [f"| {' | '.join(row)} |" for row in (header, align, *rows)] + [""]
    return "\n".join([*lines, report.caption.replace("\n", "\n\n"), ""])


def _html(report: ConfigComplexity, per_layer: bool) -> str:
    titles = ("In all", "By module")
    tables = [Table(header, rows) for header, *rows in map(readable, _tables(report, per_layer))]
    sections = [Section(title, tables=[table]) for title, table in zip(titles, tables, strict=False)]
    return render(Page(f"Complexity of {report.config}", report.caption, sections, f"mmbivit {mmbivit.__version__}"))


def _tables(report: ConfigComplexity, per_layer: bool) -> list[list[Record]]:
    return [total_records(report)] + ([layer_records(report.network)] if per_layer else [])


FORMATS = {".html": _html, ".md": _markdown, ".csv": _csv}
