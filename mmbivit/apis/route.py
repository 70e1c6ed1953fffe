"""Which way a network takes through the tools, found once: a detector or a classifier, packed or not."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mmbivit.checks import UserError
from mmbivit.deploy.header import SUFFIX, read_header

from .config import is_classifier

__all__ = ["Route", "find_route", "is_packed_file", "refuse_packed_file"]

# Options of the tools that one kind of model has alone.
_OWNERS = dict(score_thr="detector", show="detector", show_dir="detector", topk="classifier", tta="detector")


@dataclass(frozen=True)
class Route:
    """The way of a network.

    Attributes:
        kind: ``detector`` or ``classifier``.
        packed: whether the weights are a packed file, which runs on the CPU.
        checkpoint: file, URL or name of the weights.
        source: the file that says which kind it is.
    """

    kind: str
    packed: bool
    checkpoint: str | Path
    source: str | Path

    @property
    def device(self) -> str | None:
        """Where the network has to run: a packed one on the CPU, ``None`` for any device."""
        return "cpu" if self.packed else None

    def refuse_options(self, **options: Any) -> None:
        """Refuse options of the command line that the other kind has.

        Args:
            options: value of each option, ``-`` in its name as ``_``; ``None`` and ``False`` mean that it is not given.

        Raises:
            ValueError: for the first option that is given.
        """
        for name, value in options.items():
            if (owner := _OWNERS[name]) != self.kind and value is not None and value is not False:
                raise UserError(f"--{name.replace('_', '-')} is for {owner}s, and {self.source} is of a {self.kind}")


def find_route(cfg: Config | None, checkpoint: str | Path) -> Route:
    """Find the way of a network.

    Args:
        cfg: its config; ``None`` for a packed file, which says itself what it is.
        checkpoint: file, URL or name of the weights.

    Raises:
        FileNotFoundError: if there is no config, and the file does not exist.
        ValueError: if there is no config, and it is no packed file, or one of a backbone alone.
    """
    if cfg is not None:
        kind = "classifier" if is_classifier(cfg) else "detector"
        return Route(kind, is_packed_file(checkpoint), checkpoint, cfg.filename)
    kind = read_header(checkpoint).kind
    if kind == "backbone":
        raise UserError(
            f"{checkpoint} is of a backbone alone, which predicts nothing; export the whole model, without "
            "--backbone-only"
        )
    return Route(kind, True, checkpoint, checkpoint)


def is_packed_file(checkpoint: str | Path) -> bool:
    """Whether a checkpoint is meant to be a packed file, by its name."""
    return str(checkpoint).endswith(SUFFIX)


def refuse_packed_file(checkpoint: str | Path) -> None:
    """Refuse a packed file where a checkpoint of training is expected.

    Raises:
        ValueError: that says which tool takes packed files.
    """
    if is_packed_file(checkpoint):
        raise UserError(
            f"{checkpoint} is a packed file, which needs no config: "
            f"python tools/deployment/predict_packed.py {checkpoint} IMAGES..."
        )
