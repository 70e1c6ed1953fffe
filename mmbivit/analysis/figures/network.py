"""A backbone as it is built: its stages, the parts of a block, and which of them are binary."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from mmbivit.checks import UserError
from mmbivit.models import Attention, Block, find_blocks

from .style import ACCENT, DARK, GREY, LIGHT, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Part", "block_parts", "network_figure"]

PAPER = "white"


@dataclass(frozen=True)
class Part:
    """A part of a block that computes.

    Args:
        branch: the path of the module that it belongs to, such as ``mlp.si``.
        label: what it is.
        bits: of the two sides of its products, or ``None`` where it has none.
    """

    branch: str
    label: str
    bits: tuple[int, int] | None = None


def block_parts(block: nn.Module) -> Iterator[Part]:
    """Yield the parts of a block that have parameters or products, in the order in which they were built."""
    inside: tuple[str, ...] = ()  # of parts that are drawn as one
    attentions = {
        f"{name}.attention": module for name, module in block.named_modules() if isinstance(module, Attention)
    }
    for name, module in block.named_modules():
        branch, _, leaf = name.rpartition(".")
        if not name or name.startswith(inside):
            continue
        if name in attentions:
            heads = attentions[name]
            for label, bits in zip((f"q k, heads: {heads.num_heads}", "weights v"), heads.product_bits, strict=True):
                yield Part(branch, label, bits)
        elif isinstance(module, nn.Linear):
            bits = getattr(module, "product_bits", ((32, 32),))[0]
            yield Part(branch, f"{leaf}: {module.in_features} to {module.out_features}", bits)
        elif list(module.children()) or next(module.parameters(), None) is None:
            continue
        else:
            yield Part(branch, f"{leaf}: {type(module).__name__}")
        inside += (f"{name}.",)


def network_figure(backbone: nn.Module, title: str) -> "Figure":
    """Draw the stages of a backbone, and the parts of its first block.

    Args:
        backbone: of ours, or another one whose blocks are known.
        title: what the figure says above.

    Raises:
        ValueError: for a network without blocks that are known.
    """
    blocks = list(find_blocks(backbone).values())
    if not blocks:
        raise UserError(f"{type(backbone).__name__} has no transformer blocks that are known")
    stages = {stride: [block for block in blocks if block.stride == stride] for stride in {b.stride: 0 for b in blocks}}
    columns = _columns(blocks[0])
    rows = max(map(len, columns.values()))
    figure = new_figure(max(7.5, 2.9 * len(columns)), 2.2 + 0.42 * rows)
    top, bottom = figure.subplots(2, height_ratios=[1.3, 0.42 * rows + 0.5])
    figure.suptitle(title)
    _draw_stages(top, stages)
    _draw_block(bottom, columns, blocks[0].name)
    return figure


def _columns(block: Block) -> dict[str, list[Part]]:
    columns: dict[str, list[Part]] = {}
    for part in block_parts(block.module):
        columns.setdefault(part.branch or "block", []).append(part)
    return columns


def _draw_stages(ax: "Axes", stages: dict[int, list[Block]]) -> None:
    _empty(ax, len(stages), 0, 1)
    for i, (stride, blocks) in enumerate(stages.items()):
        heads = {module.num_heads for module in blocks[0].module.modules() if isinstance(module, Attention)}
        lines = [f"stage {i}: {len(blocks)} block{'s' * (len(blocks) > 1)}", f"{blocks[0].channels} channels"]
        lines += [f"{n} head{'s' * (n > 1)}" for n in heads] + [f"tokens of {stride} x {stride} pixels"]
        _box(ax, i, 0.5, 0.42, 0.42, "\n".join(lines), PAPER)
        if i:
            ax.annotate("", (i - 0.43, 0.5), (i - 0.57, 0.5), arrowprops=dict(arrowstyle="->", color=DARK))


def _draw_block(ax: "Axes", columns: dict[str, list[Part]], name: str) -> None:
    rows = max(map(len, columns.values()))
    _empty(ax, len(columns), -rows - 0.1, 1.1)
    ax.set_title(f"{name}: products of 1 bit orange, in float blue, the rest white", loc="left", fontsize=10)
    for i, (branch, parts) in enumerate(columns.items()):
        ax.text(i, 0.55, branch, ha="center", va="center", fontsize=10, color=DARK, weight="bold")
        for j, part in enumerate(parts):
            color = PAPER if part.bits is None else ACCENT if max(part.bits) == 1 else LIGHT
            label = part.label if part.bits is None else f"{part.label}  ({part.bits[0]} x {part.bits[1]} bit)"
            _box(ax, i, -j - 0.3, 0.47, 0.38, label, color)


def _empty(ax: "Axes", columns: int, bottom: float, top: float) -> None:
    ax.set(xlim=(-0.5, columns - 0.5), ylim=(bottom, top), xticks=[], yticks=[])
    ax.set_axis_off()


def _box(ax: "Axes", x: float, y: float, half_width: float, half_height: float, text: str, color: str) -> None:
    from matplotlib.patches import Rectangle

    corner = (x - half_width, y - half_height)
    ax.add_patch(Rectangle(corner, 2 * half_width, 2 * half_height, facecolor=color, edgecolor=GREY, linewidth=0.8))
    ax.text(x, y, text, ha="center", va="center", fontsize=8.5)
